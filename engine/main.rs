//! The `mcpipe` binary.

use std::process::ExitCode;

use mcpipe_cpu::alloc::CacheAligned;

#[global_allocator]
static ALLOCATOR: CacheAligned = CacheAligned;

fn main() -> ExitCode {
    ExitCode::from(mcpipe_cli::main())
}
