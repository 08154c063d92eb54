//! The `mcpipe` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(mcpipe_cli::main())
}
