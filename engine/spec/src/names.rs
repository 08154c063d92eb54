//! Names in messages: the nearest valid one, and lists of them.

use std::fmt;

/// The choice that `name` was most likely meant to be; none where no choice is near.
pub(crate) fn nearest<'a>(name: &str, choices: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // A long text is no mistyped name, and distances of long texts are slow.
    if name.is_empty() || name.len() > 80 {
        return None;
    }
    let plain = plain(name);
    choices
        .into_iter()
        .filter_map(|choice| Some((rank(&plain, choice)?, choice)))
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, choice)| choice)
}

fn plain(name: &str) -> String {
    name.trim().to_lowercase().replace(['-', ' ', '.'], "_")
}

/// How far a choice is from the name; none where it is too far to be meant.
fn rank(name: &str, choice: &str) -> Option<f64> {
    let choice = plain(choice);
    if choice == name {
        return Some(0.0);
    }
    let longer = name.chars().count().max(choice.chars().count());
    let distance = strsim::osa_distance(name, &choice);
    if distance <= (longer / 3).max(1) && distance < longer.min(name.chars().count()) {
        return Some(distance as f64);
    }
    // The start, the end or another whole part of a longer name: `mobilevit` of `mobilevit_xxs`.
    let (short, long) = if name.len() < choice.len() { (name, choice.as_str()) } else { (choice.as_str(), name) };
    if short.len() >= 3 && long.contains(short) {
        return Some(100.0 + (longer - short.chars().count()) as f64);
    }
    let similar = strsim::jaro_winkler(name, &choice);
    (similar >= 0.88).then_some(200.0 - similar)
}

/// Prints names in back quotes with commas between; a long list is cut.
pub(crate) struct Listed<'a, T: AsRef<str>>(pub &'a [T]);

impl<T: AsRef<str>> fmt::Display for Listed<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MOST: usize = 30;
        for (at, name) in self.0.iter().take(MOST).enumerate() {
            if at > 0 {
                f.write_str(", ")?;
            }
            write!(f, "`{}`", name.as_ref())?;
        }
        if self.0.len() > MOST {
            write!(f, " and {} more", self.0.len() - MOST)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_finds_what_was_meant() {
        let backbones = ["mobilevit_xxs", "mobilevit_xs", "mobilevit_s", "vit"];
        let near = |name| nearest(name, backbones);
        assert_eq!(near("mobilevit-xs"), Some("mobilevit_xs"));
        assert_eq!(near("mobilvit_xxs"), Some("mobilevit_xxs"));
        assert_eq!(near("MobileViT_S"), Some("mobilevit_s"));
        assert_eq!(near("mobilevit"), Some("mobilevit_s"));
        assert_eq!(near("ViT"), Some("vit"));
        assert_eq!(near("resnet50"), None);
        assert_eq!(near(""), None);
        assert_eq!(nearest("lr", ["to", "eps", "kind"]), None);
        assert_eq!(nearest("batchsize", ["batch_size", "steps"]), Some("batch_size"));
        assert_eq!(nearest("imge_size", ["image_size", "image"]), Some("image_size"));
        assert_eq!(nearest("x", ["y"]), None);
    }
}
