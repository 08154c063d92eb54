//! The committed JSON schema is that of the code.

use std::fs;
use std::path::Path;

mod common;

#[test]
fn committed_schema_is_current() {
    let (code, schema, _) = common::Bench::new().output(&["schema"]);
    assert_eq!(code, 0);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas/pipeline.schema.json");
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        schema == committed,
        "schemas/pipeline.schema.json is stale; write it again with\n    cargo run -q -- schema > schemas/pipeline.schema.json"
    );
}

#[test]
fn pipelines_of_the_repository_are_fine() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let bench = common::Bench::new();
    let main = root.join("pipelines/mobilevit.toml");
    let (code, out, err) = bench.output(&["check", &main.to_string_lossy()]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
}
