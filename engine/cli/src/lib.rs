//! mcpipe's command line: arguments, progress, signals, exit codes.
//!
//! Exit codes: 0 done; 1 failed; 2 bad usage or a bad file; 130 and 143 interrupted by SIGINT or SIGTERM, with the
//! state saved.

mod args;
mod commands;
mod output;
mod progress;
mod signals;

use std::panic;

use clap::Parser;
use mcpipe_run::RunError;
use mcpipe_spec::Style;

use args::{Cli, Command, DataCommand, WeightsCommand};

/// Exit code of a failure, a bug in the program included.
const FAILED: u8 = 1;

/// Runs the command that the process's arguments ask for and gives the exit code.
pub fn main() -> u8 {
    panic::set_hook(Box::new(|info| {
        output::eprint(&format!(
            "mcpipe: internal error: {info}\nThis is a bug. Please report it with the command and the pipeline file; \
             results that were finished are safe in the store.\n"
        ));
    }));
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too, with code 0. clap writes to whichever stream is right.
            let _ = error.print();
            return u8::try_from(error.exit_code()).unwrap_or(2);
        }
    };
    let ran = panic::catch_unwind(|| dispatch(&cli));
    match ran {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            report(&error);
            error.exit_code()
        }
        Err(_) => FAILED,
    }
}

fn dispatch(cli: &Cli) -> Result<u8, RunError> {
    match &cli.command {
        Command::Run(args) => commands::run::run(args, cli.quiet, cli.verbose),
        Command::Check(args) => commands::check::check(args),
        Command::Plan(args) => commands::plan::plan(args),
        Command::Export(args) => commands::export::export(args, cli.quiet),
        Command::Embed(args) => commands::embed::embed(args, cli.quiet),
        Command::Classify(args) => commands::classify::classify(args, cli.quiet),
        Command::Graph(args) => commands::graph::graph(args),
        Command::Doctor => commands::doctor::doctor(),
        Command::Schema => commands::list::schema(),
        Command::List(args) => commands::list::list(args),
        Command::Data(DataCommand::Check(args)) => commands::data::check(args),
        Command::Data(DataCommand::Index(args)) => commands::data::index(args),
        Command::Weights(WeightsCommand::Inspect(args)) => commands::weights::inspect(args),
        Command::Weights(WeightsCommand::Convert(args)) => commands::weights::convert(args),
    }
}

/// An error for people, on standard error.
fn report(error: &RunError) {
    match error {
        RunError::Spec(diagnostics) => output::eprint(&diagnostics.render(Style::for_stderr())),
        RunError::Interrupted { .. } => {
            output::eprint("mcpipe: interrupted; the same command goes on from the saved state\n");
        }
        other => output::eprint(&format!("mcpipe: error: {other}\n")),
    }
}
