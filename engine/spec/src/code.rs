//! The kinds of diagnostics, one table of them.

/// How much a diagnostic matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The pipeline runs, but likely not as meant.
    Warning,
    /// The pipeline cannot run.
    Error,
}

impl Severity {
    /// The word for it in JSON.
    pub fn id(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

macro_rules! codes {
    ($($variant:ident $id:literal $severity:ident $explanation:literal)*) => {
        /// The kind of a diagnostic; its id is stable.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code {
            $(#[doc = $explanation] $variant,)*
        }

        impl Code {
            /// Every code.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The stable id, as printed.
            pub fn id(self) -> &'static str {
                match self { $(Self::$variant => $id,)* }
            }

            /// One line on what the code means.
            pub fn explanation(self) -> &'static str {
                match self { $(Self::$variant => $explanation,)* }
            }

            /// How much a diagnostic of this code matters.
            pub fn severity(self) -> Severity {
                match self { $(Self::$variant => Severity::$severity,)* }
            }
        }
    };
}

codes! {
    Unreadable "unreadable" Error "The pipeline file cannot be read as text."
    Syntax "syntax" Error "The text is not TOML."
    DuplicateKey "duplicate-key" Error "A key or table is written twice."
    BadOverride "bad-override" Error "A `--set` argument names no place in the pipeline or holds no value."
    UnsupportedVersion "unsupported-version" Error "The file is written for another version of the format."
    UnknownKey "unknown-key" Error "A table has no such key."
    MissingKey "missing-key" Error "A key that has no default is absent."
    WrongType "wrong-type" Error "A value has another type than the key takes."
    OutOfRange "out-of-range" Error "A number lies outside what the key takes."
    WrongLength "wrong-length" Error "An array or a string is too short or too long."
    UnknownComponent "unknown-component" Error "No component of this name is registered."
    UnknownValue "unknown-value" Error "The value is none of those that the key takes."
    UnknownDevice "unknown-device" Error "There is no such kind of device."
    BadName "bad-name" Error "A name holds characters that a file name cannot safely hold."
    Duplicate "duplicate" Error "Two things that must differ have the same name or value."
    UnknownTeacher "unknown-teacher" Error "No teacher has this name."
    MissingTower "missing-tower" Error "A model lacks the image or text tower that is asked of it."
    TemplatePlaceholder "template-placeholder" Error "A prompt template lacks `{c}`, the place of the class name."
    Cycle "cycle" Error "Stages wait for each other in a circle."
    Conflict "conflict" Error "Settings contradict each other."
    Unused "unused" Warning "A setting has no effect."
    BadParams "bad-params" Error "A component cannot be built with these parameters."
    UnknownTap "unknown-tap" Error "A model has no such tap."
    DimMismatch "dim-mismatch" Error "Two embeddings of different dimension meet and no projection joins them."
    ImageSize "image-size" Error "A backbone cannot take images of this size."
    MissingFile "missing-file" Error "A file or folder that the pipeline names does not exist."
    BadFile "bad-file" Error "A file that the pipeline names cannot be used."
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.id())
    }
}

#[cfg(test)]
mod tests {
    use super::Code;

    #[test]
    fn ids_are_unique_and_plain() {
        let mut ids: Vec<_> = Code::ALL.iter().map(|code| code.id()).collect();
        assert!(ids.iter().all(|id| id.chars().all(|c| c.is_ascii_lowercase() || c == '-')));
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), Code::ALL.len());
    }
}
