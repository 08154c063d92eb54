//! Writing to standard output without a panic when nobody reads it any more.

use std::io::{self, Write};

use mcpipe_run::RunError;

/// Writes text to standard output. A reader that went away (`| head`) is no failure.
///
/// # Errors
/// Anything else that keeps the text from being written, such as a full disk behind a redirection.
pub fn print(text: &str) -> Result<(), RunError> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    match written {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(RunError::Write { path: "standard output".into(), source: e })
        }
        _ => Ok(()),
    }
}

/// Writes text to standard error; there is nowhere to report a failure of that.
pub fn eprint(text: &str) {
    let mut err = io::stderr().lock();
    let _ = err.write_all(text.as_bytes());
    let _ = err.flush();
}

/// A table for people: columns padded, the first to the left, the others to the right.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let columns = header.len();
    let width = |c: usize| {
        let cells = rows.iter().filter_map(|row| row.get(c)).map(|cell| cell.chars().count());
        cells.chain([header[c].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    let mut line = |cells: &[String]| {
        let mut out = String::new();
        for (c, &w) in widths.iter().enumerate() {
            let cell = cells.get(c).map_or("", String::as_str);
            let pad = " ".repeat(w - cell.chars().count());
            let gap = if c > 0 { "  " } else { "" };
            out.push_str(&if c == 0 { format!("{cell}{pad}") } else { format!("{gap}{pad}{cell}") });
        }
        text.push_str(out.trim_end());
        text.push('\n');
    };
    line(&header.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>());
    line(&widths.iter().map(|&w| "─".repeat(w)).collect::<Vec<_>>());
    rows.iter().for_each(|row| line(row));
    text
}
