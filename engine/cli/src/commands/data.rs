//! `mcpipe data check` and `mcpipe data index`.

use mcpipe_data::CheckOptions;
use mcpipe_run::RunError;
use serde_json::{Value, json};

use crate::args::{DataArgs, DataIndexArgs, Format};
use crate::output::print;

/// Reads a data set from end to end. The code is 1 where something is in a run's way.
pub fn check(args: &DataArgs) -> Result<u8, RunError> {
    let report = mcpipe_data::check(&[args.path.to_string_lossy()], &CheckOptions::default());
    match args.format {
        Format::Text => print(&format!("{report}\n"))?,
        Format::Json => {
            let value = serde_json::to_value(&report).map_err(|e| RunError::Usage(e.to_string()))?;
            print(&format!("{value:#}\n"))?;
        }
    }
    Ok(u8::from(!report.is_ok()))
}

/// Writes `nshards.txt` of every split.
pub fn index(args: &DataIndexArgs) -> Result<u8, RunError> {
    let splits = mcpipe_data::index(&args.path)?;
    match args.format {
        Format::Text => {
            for (split, shards) in &splits {
                print(&format!("{}: {shards} shards\n", split.join(mcpipe_data::NSHARDS).display()))?;
            }
        }
        Format::Json => {
            let list: Vec<Value> =
                splits.iter().map(|(split, shards)| json!({ "split": split, "shards": shards })).collect();
            print(&format!("{:#}\n", Value::Array(list)))?;
        }
    }
    Ok(0)
}
