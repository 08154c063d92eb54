//! Tables that turn another library's tensor names and layouts into ours.

use std::collections::BTreeMap;

use super::slot::Slot;

/// Tensors by name.
pub(super) type Slots = BTreeMap<String, Slot>;

/// One line of a table. In `from`, `*` stands for one or more characters of one segment (none of them a dot) and `**`
/// for one or more characters of any kind; in `to`, they stand for what they matched, in their order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    pub from: &'static str,
    pub to: &'static str,
    pub form: Form,
}

/// What becomes of a tensor besides its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Nothing.
    Same,
    /// A matrix is transposed.
    Transposed,
    /// Axes of one element go.
    Squeezed,
    /// It is the part at this position, from 0, of so many that are joined along the first axis (query, key, value).
    Part(usize, usize),
}

impl Rule {
    /// A rule that changes the name only.
    pub const fn rename(from: &'static str, to: &'static str) -> Rule {
        Rule { from, to, form: Form::Same }
    }

    /// The new name, where the rule speaks of `name`.
    fn rename_of(&self, name: &str) -> Option<String> {
        let mut found = Vec::new();
        if !captures(self.from, name, &mut found) {
            return None;
        }
        let mut out = String::with_capacity(name.len() + self.to.len());
        let mut rest = self.to;
        for capture in found {
            let Some(star) = rest.find('*') else { break };
            out.push_str(&rest[..star]);
            out.push_str(capture);
            rest = rest[star..].trim_start_matches('*');
        }
        out.push_str(rest);
        Some(out)
    }
}

/// Matches `name` whole; the pieces that stars stand for go to `found`.
fn captures<'n>(pattern: &str, name: &'n str, found: &mut Vec<&'n str>) -> bool {
    let Some(star) = pattern.find('*') else { return pattern == name };
    let Some(rest_name) = name.strip_prefix(&pattern[..star]) else { return false };
    let (many, rest) = match pattern[star + 1..].strip_prefix('*') {
        Some(rest) => (true, rest),
        None => (false, &pattern[star + 1..]),
    };
    for (at, c) in rest_name.char_indices() {
        if c == '.' && !many {
            break;
        }
        let end = at + c.len_utf8();
        found.push(&rest_name[..end]);
        if captures(rest, &rest_name[end..], found) {
            return true;
        }
        found.pop();
    }
    false
}

/// Whether `name` is one that `pattern` names: `*` stands for any characters, none included, the rest for itself.
pub(crate) fn names(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(rest) = parts.next().and_then(|first| name.strip_prefix(first)) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    let mut rest = rest;
    for part in middle {
        // The first place is as good as any: what a later star takes only grows.
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// Applies a table: the first rule that speaks of a name decides, and names of which none speaks stay.
///
/// # Errors
/// Two tensors of one name, a part that is missing, a layout that a rule can't change.
pub(super) fn apply(rules: &[Rule], tensors: Slots) -> Result<Slots, String> {
    let mut out = Slots::new();
    let mut parts: BTreeMap<String, Vec<Option<Slot>>> = BTreeMap::new();
    for (name, slot) in tensors {
        let ruled = rules.iter().find_map(|rule| Some((rule.form, rule.rename_of(&name)?)));
        let (form, to) = ruled.unwrap_or((Form::Same, name.clone()));
        let at_name = |e: String| format!("`{name}`: {e}");
        let slot = match form {
            Form::Same => slot,
            Form::Transposed => slot.transposed().map_err(at_name)?,
            Form::Squeezed => slot.squeezed(),
            Form::Part(part, of) => {
                let held = parts.entry(to.clone()).or_insert_with(|| vec![None; of]);
                match held.get_mut(part) {
                    Some(place @ None) => *place = Some(slot),
                    _ => return Err(format!("`{name}` would be part {part} of `{to}` twice")),
                }
                continue;
            }
        };
        if out.insert(to.clone(), slot).is_some() {
            return Err(format!("two tensors would be called `{to}`"));
        }
    }
    for (to, held) in parts {
        let whole: Option<Vec<Slot>> = held.into_iter().collect();
        let whole = whole.ok_or_else(|| format!("a part of `{to}` is missing"))?;
        if out.insert(to.clone(), Slot::joined(whole).map_err(|e| format!("`{to}`: {e}"))?).is_some() {
            return Err(format!("two tensors would be called `{to}`"));
        }
    }
    Ok(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::super::element::Element;
    use super::*;

    #[test]
    fn stars_stand_for_what_they_match() {
        let rule = Rule::rename("enc.layers.*.norm*.**", "blocks.*.ln_*.**");
        assert_eq!(rule.rename_of("enc.layers.11.norm2.a.b").as_deref(), Some("blocks.11.ln_2.a.b"));
        for other in ["enc.layers..norm2.a", "enc.layers.1.2.norm2.a", "enc.layers.1.norm2.", "enc.layers.1.norm.a"] {
            assert_eq!(rule.rename_of(other), None, "{other}");
        }
        assert_eq!(Rule::rename("a", "b").rename_of("ab"), None);
    }

    #[test]
    fn patterns_of_users() {
        for (pattern, name, fits) in [
            ("stem.*", "stem.conv.weight", true),
            ("stem.*", "stages.stem.x", false),
            ("*.bias", "a.b.bias", true),
            ("*.bias", "a.bias.b", false),
            ("a*b*c", "abc", true),
            ("a*b*c", "acb", false),
            ("a*bb", "abb", true),
            ("*ab", "aab", true),
            ("head", "head.fc", false),
            ("*", "", true),
        ] {
            assert_eq!(names(pattern, name), fits, "{pattern} {name}");
        }
    }

    #[test]
    fn parts_are_joined_and_matrices_transposed() {
        let file: Vec<u8> = (0..12).collect();
        let matrix = |start| Slot::plain(Element::U8, vec![1, 2], start);
        let tensors: Slots = [("l.q", 0), ("l.k", 2), ("l.v", 4), ("p", 6), ("left", 8)]
            .into_iter()
            .map(|(name, start)| (name.to_owned(), matrix(start)))
            .collect();
        let part = |from, n| Rule { from, to: "*.qkv", form: Form::Part(n, 3) };
        let rules = [
            part("*.q", 0),
            part("*.k", 1),
            part("*.v", 2),
            Rule { from: "p", to: "proj", form: Form::Transposed },
            Rule { from: "none", to: "left", form: Form::Squeezed },
        ];
        let out = apply(&rules, tensors.clone()).unwrap();
        assert_eq!(out.keys().collect::<Vec<_>>(), ["l.qkv", "left", "proj"]);
        assert_eq!((out["l.qkv"].shape.as_slice(), &*out["l.qkv"].bytes(&file)), (&[3, 2][..], &file[..6]));
        assert_eq!(out["proj"].shape, [2, 1]);
        let mut lacking = tensors.clone();
        lacking.remove("l.k");
        assert!(apply(&rules, lacking).unwrap_err().contains("l.qkv"));
        let twice = [Rule::rename("p", "left")];
        assert!(apply(&twice, tensors).unwrap_err().contains("left"));
    }
}
