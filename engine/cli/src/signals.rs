//! SIGINT and SIGTERM: the first asks the run to stop at a safe point, the second ends the process.

use std::io;
use std::thread;

use mcpipe_run::Interrupt;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::output::eprint;

/// Listens for signals on a thread of its own until the process ends.
///
/// # Errors
/// The system refuses the handler.
pub fn listen(interrupt: &Interrupt) -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let interrupt = interrupt.clone();
    thread::Builder::new().name("signals".into()).spawn(move || {
        let mut asked = false;
        for signal in signals.forever() {
            if asked {
                // Files are written to temporary names and renamed, so nothing half-written is left under its name.
                std::process::exit(128 + signal);
            }
            asked = true;
            eprint("\nstopping after this step; its state is saved (again: stop at once)\n");
            interrupt.raise(signal);
        }
    })?;
    Ok(())
}
