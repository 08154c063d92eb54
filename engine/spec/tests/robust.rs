//! No text, override or mutation of a valid pipeline makes the crate panic.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::LazyLock;

use common::{VALID, components};
use mcpipe_spec::{Components, Style, load_text};
use proptest::prelude::*;

static COMPONENTS: LazyLock<Components> = LazyLock::new(components);

/// Loads, and where that fails renders in every way.
fn try_all(text: &str, overrides: &[String]) {
    let found = match load_text(Path::new("p.toml"), text, overrides, &COMPONENTS) {
        Ok(document) => {
            let resolved = document.spec.to_toml().unwrap();
            let again = load_text(Path::new("p.toml"), &resolved, &[], &COMPONENTS);
            assert!(again.is_ok_and(|again| again.spec == document.spec), "{resolved}");
            document.warnings
        }
        Err(found) => {
            assert!(found.has_errors());
            found
        }
    };
    for style in [Style::Fancy, Style::Plain, Style::Narrated] {
        assert!(found.is_empty() || !found.render(style).is_empty());
    }
    assert_eq!(found.to_json_lines().lines().count(), found.len());
    // Every place lies in its text.
    for diagnostic in &found {
        assert!(!diagnostic.message.is_empty());
        if let Some(location) = &diagnostic.location {
            let source = found.sources().get(location.source).unwrap();
            assert!(source.text.get(location.span.clone()).is_some(), "{diagnostic:?}");
        }
    }
}

/// Pieces that mean something in a pipeline.
fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("[[teacher]]\n".to_owned()),
        Just("[student]\n".to_owned()),
        Just("kind = \"ema\"\n".to_owned()),
        Just("teacher = \"clip\"\n".to_owned()),
        Just("level = \"features\"\n".to_owned()),
        Just("= { a = [1, 2.5, nan, -inf], b.c.d = 'x' }".to_owned()),
        Just("\"\"\"".to_owned()),
        Just("\\u00".to_owned()),
        Just("1979-05-27T07:32:00Z".to_owned()),
        "[\\[\\]{}=\",.'#\n\r\t a-z0-9_é😀-]{0,12}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_text(text in "\\PC{0,200}|[\\x00-\\x7f]{0,200}") {
        try_all(&text, &[]);
    }

    #[test]
    fn pieces_in_any_order(pieces in prop::collection::vec(piece(), 0..30)) {
        try_all(&pieces.concat(), &[]);
    }

    #[test]
    fn mutations_of_a_valid_file(
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..12, piece()), 1..4)
    ) {
        let mut chars: Vec<char> = VALID.chars().collect();
        for (at, remove, insert) in &edits {
            let at = at.index(chars.len());
            let end = (at + remove).min(chars.len());
            chars.splice(at..end, insert.chars());
        }
        try_all(&chars.into_iter().collect::<String>(), &[]);
    }

    #[test]
    fn lines_left_out_or_doubled(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 1..4)
    ) {
        let mut lines: Vec<&str> = VALID.lines().collect();
        for (at, double) in &edits {
            let at = at.index(lines.len());
            if *double { lines.insert(at, lines[at]) } else { lines.remove(at); }
        }
        try_all(&lines.join("\n"), &[]);
    }

    #[test]
    fn values_of_other_types(at in any::<prop::sample::Index>(), value in prop_oneof![
        Just("0"), Just("-1"), Just("1e400"), Just("nan"), Just("\"\""), Just("[]"), Just("{}"), Just("[[]]"),
        Just("true"), Just("9223372036854775807"), Just("07:32:00"), Just("[{}, {}]"), Just("{ kind = 3 }"),
    ]) {
        let lines: Vec<&str> = VALID.lines().filter(|line| line.contains(" = ")).collect();
        let line = lines[at.index(lines.len())];
        let key = line.split(" = ").next().unwrap();
        try_all(&VALID.replacen(line, &format!("{key} = {value}"), 1), &[]);
    }

    #[test]
    fn arbitrary_overrides(
        paths in prop::collection::vec(
            prop_oneof![
                "[a-z.\\[\\]0-9='\" é]{0,20}",
                "(teacher|student|distill|training|data|eval)([.\\[](0|1|name|steps|kind|params|99)\\]?){0,3}=[a-z0-9.{}\\[\\]\"]{0,8}",
            ],
            0..4,
        )
    ) {
        try_all(VALID, &paths);
    }
}

#[test]
fn endless_nesting_is_refused() {
    for text in [
        format!("a{} = 1", ".a".repeat(200_000)),
        format!("[a{}]", ".a".repeat(200_000)),
        format!("[a{}]", ". \"a\"".repeat(100_000)),
        format!("a = {}", "[".repeat(200_000)),
        format!("a = {}1{}", "{a=".repeat(70), "}".repeat(70)),
        format!("a = {}", "{ a.b.c.d.e.f = ".repeat(79)),
    ] {
        try_all(&text, &[]);
        try_all(VALID, &[text]);
    }
    try_all(VALID, &[format!("a{}=1", ".a".repeat(200_000)), format!("a=[{}", "[".repeat(200_000))]);
}
