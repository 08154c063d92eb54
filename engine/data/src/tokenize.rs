//! CLIP's byte-pair tokenizer with its embedded vocabulary, ids as `open_clip.tokenize` gives them.
//!
//! The pairs are merged by `instant-clip-tokenizer`; the cleaning before it (what open_clip does with ftfy and
//! `html.unescape`) is ours. Of ftfy, everything for ordinary text is matched: HTML entities, curly quotes, Latin
//! ligatures, full-width forms, line breaks, control characters, NFC. Left out: the repair of mojibake (text decoded
//! with the wrong encoding) and of half-width katakana and hangul.

use std::borrow::Cow;
use std::sync::OnceLock;

use instant_clip_tokenizer::Tokenizer as Bpe;
use unicode_normalization::{UnicodeNormalization, is_nfc};

use crate::entities::entity;
use crate::error::{DataError, Result};

/// Size of the vocabulary; ids lie in 0..49408.
pub const VOCABULARY: usize = 49408;
/// Id of the start-of-text token.
pub const START_OF_TEXT: i32 = 49406;
/// Id of the end-of-text token; the greatest id, so that its place is the argmax of a row.
pub const END_OF_TEXT: i32 = 49407;

/// Merging pairs takes quadratic time in the length of a word, so the text of a caption is cut to this many bytes per
/// token of context first. The longest tokens of the vocabulary have about as many bytes, so that ordinary text never
/// loses a token that would have been kept.
const BYTES_PER_TOKEN: usize = 64;

/// Ids of one caption.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// Start of text, the caption's ids, end of text, zeros: `context_length` ids.
    pub ids: Vec<i32>,
    /// Whether the caption was longer than the context.
    pub truncated: bool,
}

/// CLIP's tokenizer.
pub struct Tokenizer {
    bpe: Bpe,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tokenizer(CLIP)")
    }
}

/// The tokenizer of the process: reading the vocabulary takes some tens of milliseconds, so it is done once.
pub fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| Tokenizer { bpe: Bpe::new() })
}

/// Checks a text tower's context length: room for start, end and one token.
///
/// # Errors
/// [`DataError::Option`].
pub fn check_context_length(context_length: usize) -> Result<()> {
    if (3..=65_536).contains(&context_length) {
        Ok(())
    } else {
        Err(DataError::Option(format!("context length {context_length}: expected 3 to 65536")))
    }
}

impl Tokenizer {
    /// Ids of `text` for a tower of `context_length` positions. A caption that is too long keeps its first tokens and
    /// the end-of-text token, as open_clip does. A context of less than 2 gives what fits.
    pub fn tokenize(&self, text: &str, context_length: usize) -> Tokens {
        let clean = clean(text);
        let room = context_length.saturating_mul(BYTES_PER_TOKEN);
        let cut = clean.floor_char_boundary(room);
        let mut tokens = vec![self.bpe.start_of_text()];
        self.bpe.encode(&clean[..cut], &mut tokens);
        tokens.push(self.bpe.end_of_text());
        let truncated = cut < clean.len() || tokens.len() > context_length;
        let mut ids: Vec<i32> = tokens.into_iter().map(|t| i32::from(t.to_u16())).collect();
        if ids.len() > context_length {
            ids.truncate(context_length);
            if let Some(last) = ids.last_mut() {
                *last = END_OF_TEXT;
            }
        }
        ids.resize(context_length, 0);
        Tokens { ids, truncated }
    }

    /// Ids of several texts, row after row: `[texts.len(), context_length]`, and the number of truncated ones.
    pub fn tokenize_batch<S: AsRef<str>>(&self, texts: &[S], context_length: usize) -> (Vec<i32>, usize) {
        let mut ids = Vec::with_capacity(texts.len() * context_length);
        let mut truncated = 0;
        for text in texts {
            let tokens = self.tokenize(text.as_ref(), context_length);
            truncated += usize::from(tokens.truncated);
            ids.extend(tokens.ids);
        }
        (ids, truncated)
    }
}

/// open_clip's `_clean_lower`: ftfy, HTML entities twice, white space to single spaces, lower case.
fn clean(text: &str) -> String {
    let text = fix_text(text);
    let text = unescape(&unescape(&text, true), true).into_owned();
    let mut out = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(word);
    }
    out.to_lowercase()
}

/// The part of ftfy's `fix_text` described at the top.
fn fix_text(text: &str) -> String {
    if text.bytes().all(|b| (0x20..0x7f).contains(&b) && b != b'&') {
        return text.to_owned();
    }
    // ftfy takes a literal `<` for a sign that the text is HTML that is meant.
    let text = if text.contains('<') { Cow::Borrowed(text) } else { unescape(text, false) };
    let text = remove_terminal_escapes(&text);
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\u{02bc}' | '\u{2018}'..='\u{201b}' => out.push('\''),
            '\u{201c}'..='\u{201f}' => out.push('"'),
            '\r' | '\u{2028}' | '\u{2029}' | '\u{85}' => out.push('\n'),
            '\t' | '\n' | '\u{0c}' => out.push(c),
            '\0'..='\u{1f}' | '\u{7f}' => {}
            '\u{206a}'..='\u{206f}' | '\u{fff9}'..='\u{fffc}' | '\u{feff}' => {}
            '\u{3000}' => out.push(' '),
            // Full-width ASCII stands at a fixed distance from ASCII.
            '\u{ff01}'..='\u{ff5e}' => {
                out.push(char::from_u32(c as u32 - 0xfee0).unwrap_or(c));
            }
            _ => match ligature(c) {
                Some(letters) => out.push_str(letters),
                None => out.push(c),
            },
        }
    }
    if is_nfc(&out) { out } else { out.nfc().collect() }
}

fn ligature(c: char) -> Option<&'static str> {
    Some(match c {
        'Ĳ' => "IJ",
        'ĳ' => "ij",
        'ŉ' => "ʼn",
        'Ǳ' => "DZ",
        'ǲ' => "Dz",
        'ǳ' => "dz",
        'Ǆ' => "DŽ",
        'ǅ' => "Dž",
        'ǆ' => "dž",
        'Ǉ' => "LJ",
        'ǈ' => "Lj",
        'ǉ' => "lj",
        'Ǌ' => "NJ",
        'ǋ' => "Nj",
        'ǌ' => "nj",
        'ﬀ' => "ff",
        'ﬁ' => "fi",
        'ﬂ' => "fl",
        'ﬃ' => "ffi",
        'ﬄ' => "ffl",
        'ﬅ' => "ſt",
        'ﬆ' => "st",
        _ => return None,
    })
}

/// Drops `ESC [ digits-and-semicolons letter`.
fn remove_terminal_escapes(text: &str) -> Cow<'_, str> {
    if !text.contains("\u{1b}[") {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\u{1b}[") {
        out.push_str(&rest[..at]);
        let after = &rest[at + 2..];
        let tail = after.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';');
        if tail.starts_with(|c: char| c.is_ascii_alphabetic()) {
            rest = &tail[1..];
        } else {
            out.push_str("\u{1b}[");
            rest = after;
        }
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// HTML entities to characters. `lenient` also takes what HTML 5 allows without a semicolon (`&amp`, `&#65`).
fn unescape(text: &str, lenient: bool) -> Cow<'_, str> {
    if !text.contains('&') {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        match reference(&rest[1..], lenient) {
            Some((character, length)) => {
                out.extend(character);
                rest = &rest[1 + length..];
            }
            None => {
                out.push('&');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// The character of the reference at the start of `text` (after its `&`), and the bytes that it takes. The character
/// is absent where HTML 5 drops the reference.
fn reference(text: &str, lenient: bool) -> Option<(Option<char>, usize)> {
    if let Some(number) = text.strip_prefix('#') {
        let (digits, radix) = match number.strip_prefix(['x', 'X']) {
            Some(hex) => (hex, 16),
            None => (number, 10),
        };
        let count = digits.bytes().take_while(|b| (*b as char).is_digit(radix)).count();
        let semicolon = digits.as_bytes().get(count) == Some(&b';');
        if count == 0 || !(semicolon || lenient) {
            return None;
        }
        let length = 1 + usize::from(radix == 16) + count + usize::from(semicolon);
        return Some((numeric(&digits[..count], radix), length));
    }
    let name_length = text.bytes().take(32).take_while(u8::is_ascii_alphanumeric).count();
    let name = &text[..name_length];
    if text.as_bytes().get(name_length) == Some(&b';')
        && let Some(c) = entity(name)
    {
        return Some((Some(c), name_length + 1));
    }
    if !lenient {
        return None;
    }
    // Without a semicolon: the longest prefix among the Latin-1 names.
    (2..=name_length).rev().find_map(|n| {
        let c = entity(&name[..n]).filter(|c| (*c as u32) < 256 && &name[..n] != "apos")?;
        Some((Some(c), n))
    })
}

fn numeric(digits: &str, radix: u32) -> Option<char> {
    let Ok(code) = u32::from_str_radix(digits, radix) else { return Some('\u{fffd}') };
    match code {
        0 | 0xd800..=0xdfff => Some('\u{fffd}'),
        0x80..=0x9f => Some(WINDOWS_1252[code as usize - 0x80]),
        1..=8 | 0xb | 0xe..=0x1f | 0x7f | 0xfdd0..=0xfdef => None,
        code if code & 0xfffe == 0xfffe => None,
        code => Some(char::from_u32(code).unwrap_or('\u{fffd}')),
    }
}

/// What HTML 5 reads the code points 0x80 to 0x9f as.
const WINDOWS_1252: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}', '\u{90}', '‘', '’',
    '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
];

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Case {
        context_length: usize,
        text: String,
        ids: Vec<i32>,
    }

    /// Ids from open_clip 3.3.0; `tests/fixtures/make_tokens.py` writes them.
    #[test]
    fn ids_equal_open_clips() {
        let cases: Vec<Case> = serde_json::from_str(include_str!("../tests/fixtures/tokens.json")).unwrap();
        assert!(cases.len() > 50);
        let mut wrong = Vec::new();
        for case in &cases {
            let tokens = tokenizer().tokenize(&case.text, case.context_length);
            assert_eq!(tokens.ids.len(), case.context_length);
            let mut expected = case.ids.clone();
            expected.resize(case.context_length, 0);
            if tokens.ids != expected {
                wrong.push((&case.text, tokens.ids, expected));
            }
        }
        assert!(wrong.is_empty(), "{} differ: {wrong:#?}", wrong.len());
    }

    #[test]
    fn long_captions_are_cut_and_counted() {
        let long = "word ".repeat(200);
        let tokens = tokenizer().tokenize(&long, 16);
        assert!(tokens.truncated);
        assert_eq!((tokens.ids[0], tokens.ids[15]), (START_OF_TEXT, END_OF_TEXT));
        let (ids, truncated) = tokenizer().tokenize_batch(&["a", long.as_str(), "b c"], 8);
        assert_eq!((ids.len(), truncated), (24, 1));
        assert!(!tokenizer().tokenize("a b", 4).truncated);
        assert!(tokenizer().tokenize("a b c", 4).truncated);
        assert!(tokenizer().tokenize("a", 0).ids.is_empty());
        assert_eq!(tokenizer().tokenize("a", 1).ids, [END_OF_TEXT]);
    }

    /// A word of a megabyte would take hours if pairs were merged over all of it.
    #[test]
    fn a_huge_word_takes_no_time() {
        let start = std::time::Instant::now();
        let tokens = tokenizer().tokenize(&"äb".repeat(500_000), 77);
        assert!(tokens.truncated);
        assert!(start.elapsed().as_secs() < 5);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]
        #[test]
        fn any_text(text in "\\PC*|[&#;x0-9a-f<\u{1b}\\[]*") {
            let tokens = tokenizer().tokenize(&text, 16);
            proptest::prop_assert_eq!(tokens.ids.len(), 16);
            proptest::prop_assert!(tokens.ids.iter().all(|&i| (0..VOCABULARY as i32).contains(&i)));
        }
    }
}
