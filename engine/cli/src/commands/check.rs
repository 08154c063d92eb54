//! `mcpipe check`.

use mcpipe_run::{RunError, Settings, compile};
use mcpipe_spec::{Diagnostics, Style};

use super::load;
use crate::args::{CheckArgs, Format};
use crate::output::{eprint, print};

/// Checks a pipeline file. The code is 2 where it has mistakes; warnings alone are none.
pub fn check(args: &CheckArgs) -> Result<u8, RunError> {
    let checked = load(&args.file).and_then(|document| {
        let warnings = document.warnings.clone();
        compile(document, &Settings::default()).map(|pipeline| (warnings, pipeline))
    });
    match checked {
        Ok((warnings, pipeline)) => {
            show(&warnings, args.format)?;
            if args.format == Format::Text {
                let file = args.file.file.display();
                print(&format!("{file}: fine, {} stages\n", pipeline.plan.len()))?;
            }
            Ok(0)
        }
        Err(RunError::Spec(diagnostics)) => {
            show(&diagnostics, args.format)?;
            Ok(2)
        }
        Err(other) => Err(other),
    }
}

fn show(diagnostics: &Diagnostics, format: Format) -> Result<(), RunError> {
    match format {
        Format::Json => print(&diagnostics.to_json_lines()),
        Format::Text => {
            if !diagnostics.is_empty() {
                eprint(&diagnostics.render(Style::for_stderr()));
            }
            Ok(())
        }
    }
}
