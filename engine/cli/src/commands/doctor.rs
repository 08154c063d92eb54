//! `mcpipe doctor`.

use std::fmt::Write;

use mcpipe_cuda::doctor::examine;
use mcpipe_run::RunError;

use crate::output::print;

/// Says what of a GPU's needs is there, and what `device = "auto"` would do.
pub fn doctor() -> Result<u8, RunError> {
    let findings = examine();
    let width = findings.iter().map(|f| f.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for f in &findings {
        let state = match (f.ok, f.required) {
            (true, _) => "ok",
            (false, true) => "missing",
            (false, false) => "not found",
        };
        let _ = writeln!(text, "{state:9}  {:width$}  {}", f.name, f.text);
    }
    let lacking: Vec<&str> = findings.iter().filter(|f| f.required && !f.ok).map(|f| f.name.as_str()).collect();
    let _ = if lacking.is_empty() {
        writeln!(text, "A GPU can be used: `device = \"auto\"` takes it.")
    } else {
        writeln!(text, "No GPU can be used for want of: {}. `device = \"auto\"` takes the CPU.", lacking.join(", "))
    };
    print(&text)?;
    Ok(0)
}
