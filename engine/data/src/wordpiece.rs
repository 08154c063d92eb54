//! BERT's WordPiece tokenizer over a `vocab.txt`, ids as `transformers.BertTokenizer` gives them (Devlin et al. 2019;
//! Wu et al. 2016 for the pieces).
//!
//! A text is cleaned (control characters dropped, white space to spaces, CJK ideographs set apart, and for uncased
//! vocabularies accents stripped and letters lowered), split at white space and punctuation, and each word is cut from
//! its front into the longest pieces that the vocabulary holds; pieces inside a word begin with `##`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use unicode_normalization::UnicodeNormalization;
use unicode_properties::{GeneralCategory, GeneralCategoryGroup, UnicodeGeneralCategory};

use crate::error::{DataError, Result};
use crate::tokenize::Tokens;

/// Words of more characters are unknown as a whole.
const MAX_WORD_CHARS: usize = 100;

/// The text of a caption is cut to this many bytes per token of context before it is cleaned: longer than any word that
/// still has pieces, so that no token is lost that would have been kept, unless most of the text is dropped characters.
const BYTES_PER_TOKEN: usize = 4 * (MAX_WORD_CHARS + 1);

/// Most entries of a vocabulary file, and most bytes of it: guards against a file of another kind.
const MAX_ENTRIES: usize = 4_000_000;
const MAX_BYTES: u64 = 256 << 20;

/// Tokens with a role of their own, recognised in the text, too, as `BertTokenizer` does.
const SPECIAL: [&str; 5] = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"];

/// A WordPiece vocabulary with its rules of cleaning.
#[derive(Clone, Debug)]
pub struct WordPiece {
    /// Id of a piece at the start of a word.
    start: HashMap<Box<str>, i32>,
    /// Id of a piece inside a word, without its `##`.
    inside: HashMap<Box<str>, i32>,
    entries: usize,
    /// Characters of the longest piece.
    longest: usize,
    lowercase: bool,
    unknown: i32,
    classify: i32,
    separator: i32,
    padding: i32,
    digest: blake3::Hash,
}

impl WordPiece {
    /// Reads a `vocab.txt`: one piece a line, the line's number (from 0) its id. With `lowercase` texts are lowered and
    /// their accents stripped, as for BERT's uncased vocabularies.
    ///
    /// # Errors
    /// A file that can't be read, is no UTF-8 or too large, or lacks `[UNK]`, `[CLS]`, `[SEP]` or `[PAD]`.
    pub fn open(path: &Path, lowercase: bool) -> Result<Self> {
        let read = |source| DataError::Read { path: path.to_owned(), source };
        let size = std::fs::metadata(path).map_err(read)?.len();
        if size > MAX_BYTES {
            let reason = format!("a vocabulary of {size} bytes, {MAX_BYTES} allowed");
            return Err(DataError::Line { path: path.to_owned(), line: 1, reason });
        }
        let bytes = std::fs::read(path).map_err(read)?;
        Self::parse(path, &bytes, lowercase)
    }

    fn parse(path: &Path, bytes: &[u8], lowercase: bool) -> Result<Self> {
        let refuse = |line: usize, reason: String| DataError::Line { path: path.to_owned(), line, reason };
        let text = std::str::from_utf8(bytes).map_err(|e| {
            let line = 1 + bytes[..e.valid_up_to()].iter().filter(|&&b| b == b'\n').count();
            refuse(line, "not UTF-8; a vocabulary is a text file with one piece a line".into())
        })?;
        let (mut start, mut inside) = (HashMap::new(), HashMap::new());
        let (mut longest, mut entries) = (0, 0);
        for line in text.lines() {
            if entries >= MAX_ENTRIES {
                return Err(refuse(entries + 1, format!("more than {MAX_ENTRIES} pieces")));
            }
            let id = i32::try_from(entries).unwrap_or(i32::MAX);
            entries += 1;
            // A piece that comes twice has its last line's id, as in a dict.
            let (table, piece) = match line.strip_prefix("##") {
                Some(piece) if !piece.is_empty() => (&mut inside, piece),
                _ => (&mut start, line),
            };
            longest = longest.max(piece.chars().count());
            table.insert(Box::from(piece), id);
        }
        let special = |name: &str| {
            let id = start.get(name).copied();
            id.ok_or_else(|| {
                refuse(entries.max(1), format!("the vocabulary has no `{name}`; is this BERT's vocab.txt?"))
            })
        };
        let [unknown, classify, separator, padding] =
            [special("[UNK]")?, special("[CLS]")?, special("[SEP]")?, special("[PAD]")?];
        let digest = blake3::hash(bytes);
        Ok(WordPiece { start, inside, entries, longest, lowercase, unknown, classify, separator, padding, digest })
    }

    /// Number of ids; they lie in 0..len.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether the vocabulary is empty, which no vocabulary that was read is.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Id that fills a row up.
    pub fn padding(&self) -> i32 {
        self.padding
    }

    /// Hash of the vocabulary's file.
    pub fn digest(&self) -> String {
        self.digest.to_hex().to_string()
    }

    /// Ids of `text` for a tower of `context_length` positions: `[CLS]`, the pieces, `[SEP]`, then `[PAD]`. A text that
    /// is too long keeps its first pieces. A context of less than 2 gives what fits.
    pub fn tokenize(&self, text: &str, context_length: usize) -> Tokens {
        let cut = text.floor_char_boundary(context_length.saturating_mul(BYTES_PER_TOKEN));
        let room = context_length.saturating_sub(2);
        let mut ids = vec![self.classify];
        let mut rest = &text[..cut];
        while let Some((at, name)) = next_special(rest) {
            self.encode(&rest[..at], room + 2, &mut ids);
            ids.extend(self.start.get(name));
            rest = &rest[at + name.len()..];
        }
        self.encode(rest, room + 2, &mut ids);
        let truncated = cut < text.len() || ids.len() > room + 1;
        ids.truncate(room + 1);
        ids.push(self.separator);
        ids.truncate(context_length);
        ids.resize(context_length, self.padding);
        Tokens { ids, truncated }
    }

    /// Appends the ids of a text without special tokens, stopping soon after there are `enough`.
    fn encode(&self, text: &str, enough: usize, ids: &mut Vec<i32>) {
        let clean = self.clean(text);
        let mut word = String::new();
        for c in clean.chars() {
            if ids.len() > enough {
                return;
            }
            if c.is_whitespace() {
                self.pieces(&std::mem::take(&mut word), ids);
            } else if is_punctuation(c) {
                self.pieces(&std::mem::take(&mut word), ids);
                self.pieces(c.encode_utf8(&mut [0; 4]), ids);
            } else {
                word.push(c);
            }
        }
        self.pieces(&word, ids);
    }

    fn clean(&self, text: &str) -> String {
        let mut spaced = String::with_capacity(text.len());
        for c in text.chars() {
            match c {
                '\t' | '\n' | '\r' => spaced.push(' '),
                '\0' | '\u{fffd}' => {}
                c if is_control(c) => {}
                c if c.is_whitespace() => spaced.push(' '),
                c if is_ideograph(c) => spaced.extend([' ', c, ' ']),
                c => spaced.push(c),
            }
        }
        if !self.lowercase {
            return spaced;
        }
        let stripped = spaced.nfd().filter(|&c| c.general_category() != GeneralCategory::NonspacingMark);
        // Letter by letter: a final sigma is a sigma here.
        stripped.flat_map(char::to_lowercase).collect()
    }

    /// Appends the pieces of a word, greedily the longest; a word that can't be cut up is unknown.
    fn pieces(&self, word: &str, ids: &mut Vec<i32>) {
        if word.is_empty() {
            return;
        }
        let ends: Vec<usize> = word.char_indices().map(|(i, c)| i + c.len_utf8()).collect();
        if ends.len() > MAX_WORD_CHARS {
            return ids.push(self.unknown);
        }
        let before = ids.len();
        let (mut from, mut done) = (0, 0);
        while done < ends.len() {
            let table = if done == 0 { &self.start } else { &self.inside };
            let last = ends.len().min(done + self.longest);
            let found = (done..last).rev().find_map(|e| Some((e, *table.get(&word[from..ends[e]])?)));
            let Some((end, id)) = found else {
                ids.truncate(before);
                return ids.push(self.unknown);
            };
            ids.push(id);
            (from, done) = (ends[end], end + 1);
        }
    }
}

/// The first special token written out in a text.
fn next_special(text: &str) -> Option<(usize, &'static str)> {
    let found = SPECIAL.iter().filter_map(|name| Some((text.find(name)?, *name)));
    found.min_by_key(|(at, _)| *at)
}

/// Which texts become which ids: a tokenizer that a text tower was trained with.
#[derive(Clone, Debug, Default)]
pub enum CaptionTokenizer {
    /// CLIP's byte pairs.
    #[default]
    Clip,
    /// Pieces of a vocabulary read from a file.
    WordPiece {
        /// The file.
        path: PathBuf,
        /// Its pieces.
        vocabulary: Arc<WordPiece>,
    },
}

impl CaptionTokenizer {
    /// Number of ids.
    pub fn len(&self) -> usize {
        match self {
            CaptionTokenizer::Clip => crate::tokenize::VOCABULARY,
            CaptionTokenizer::WordPiece { vocabulary, .. } => vocabulary.len(),
        }
    }

    /// Whether there are no ids, which never happens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What a stored result depends on: nothing for CLIP's built-in vocabulary, else the file's hash.
    pub fn digest(&self) -> Option<String> {
        match self {
            CaptionTokenizer::Clip => None,
            CaptionTokenizer::WordPiece { vocabulary, .. } => Some(vocabulary.digest()),
        }
    }

    /// Ids of `text` for a tower of `context_length` positions.
    pub fn tokenize(&self, text: &str, context_length: usize) -> Tokens {
        match self {
            CaptionTokenizer::Clip => crate::tokenize::tokenizer().tokenize(text, context_length),
            CaptionTokenizer::WordPiece { vocabulary, .. } => vocabulary.tokenize(text, context_length),
        }
    }
}

fn is_control(c: char) -> bool {
    use GeneralCategory as G;
    matches!(c.general_category(), G::Control | G::Format | G::PrivateUse | G::Surrogate)
}

fn is_punctuation(c: char) -> bool {
    c.is_ascii_punctuation() || c.general_category_group() == GeneralCategoryGroup::Punctuation
}

/// The blocks that BERT sets apart: CJK ideographs, not kana or hangul.
fn is_ideograph(c: char) -> bool {
    matches!(
        u32::from(c),
        0x4e00..=0x9fff
            | 0x3400..=0x4dbf
            | 0x20000..=0x2a6df
            | 0x2a700..=0x2b73f
            | 0x2b740..=0x2b81f
            | 0x2b920..=0x2ceaf
            | 0xf900..=0xfaff
            | 0x2f800..=0x2fa1f
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Case {
        lowercase: bool,
        context_length: usize,
        text: String,
        ids: Vec<i32>,
    }

    fn vocabulary(lowercase: bool) -> WordPiece {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vocab.txt");
        WordPiece::open(&path, lowercase).unwrap()
    }

    /// Ids from transformers' `BertTokenizer`; `tests/fixtures/make_wordpiece.py` writes them.
    #[test]
    fn ids_equal_berts() {
        let cases: Vec<Case> = serde_json::from_str(include_str!("../tests/fixtures/wordpiece.json")).unwrap();
        assert!(cases.len() > 80);
        let both = [vocabulary(false), vocabulary(true)];
        let wrong: Vec<_> = cases
            .iter()
            .filter_map(|case| {
                let ids = both[usize::from(case.lowercase)].tokenize(&case.text, case.context_length).ids;
                (ids != case.ids).then_some((case.lowercase, &case.text, ids, &case.ids))
            })
            .collect();
        assert!(wrong.is_empty(), "{} differ: {wrong:#?}", wrong.len());
    }

    #[test]
    fn long_captions_are_cut_and_counted() {
        let w = vocabulary(true);
        let long = w.tokenize(&"dog ".repeat(500), 16);
        assert!(long.truncated && long.ids.len() == 16 && long.ids[15] == w.separator);
        assert!(!w.tokenize("dog dog", 4).truncated && w.tokenize("dog dog dog", 4).truncated);
        assert_eq!(w.tokenize("dog", 1).ids, [w.classify]);
        assert!(w.tokenize("dog", 0).ids.is_empty());
        let start = std::time::Instant::now();
        w.tokenize(&"x".repeat(10_000_000), 77);
        assert!(start.elapsed().as_secs() < 5);
    }

    #[test]
    fn files_that_are_no_vocabulary_are_refused() {
        let parse = |bytes: &[u8]| WordPiece::parse(Path::new("v.txt"), bytes, true).unwrap_err().to_string();
        assert!(parse(b"[PAD]\n[UNK]\n[CLS]\nthe\n").contains("no `[SEP]`"));
        assert!(parse(b"").contains("no `[UNK]`"));
        assert!(parse(b"[PAD]\nab\xff\n").starts_with("v.txt:2: not UTF-8"));
        assert!(WordPiece::open(Path::new("/nowhere/vocab.txt"), true).is_err());
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]
        #[test]
        fn any_text(text in "\\PC*|[a-z# \\[CLS\\]]*") {
            let w = vocabulary(true);
            let tokens = w.tokenize(&text, 16);
            proptest::prop_assert_eq!(tokens.ids.len(), 16);
            proptest::prop_assert!(tokens.ids.iter().all(|&i| (0..w.len() as i32).contains(&i)));
        }
    }
}
