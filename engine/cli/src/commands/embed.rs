//! `mcpipe embed`.

use mcpipe_run::{EmbedOptions, EmbeddingFile, Inputs, RunError};

use super::{lines, model, model_options};
use crate::args::EmbedArgs;
use crate::output::print;
use crate::progress::Counter;

/// Writes embeddings of images or texts.
pub fn embed(args: &EmbedArgs, quiet: bool) -> Result<u8, RunError> {
    let (source, given) = model(&args.model, &args.paths)?;
    let inputs = inputs(args, given)?;
    let mut taps: Vec<String> = Vec::new();
    for tap in &args.tap {
        if !taps.contains(tap) {
            taps.push(tap.clone());
        }
    }
    let form = EmbeddingFile::of(&args.output, &taps)?;
    let options = EmbedOptions { taps, normalize: !args.no_normalize, ..model_options(&args.model)? };
    let counter = Counter::new("embed", quiet);
    let embeddings = mcpipe_run::embed(&source, &inputs, &options, &|done, all| counter.set(done, all))?;
    drop(counter);
    let beside = embeddings.write(&args.output, form)?;
    if !quiet {
        let mut line = format!("{}: embedding {:?}", args.output.display(), embeddings.embedding.shape);
        for (name, rows) in &embeddings.taps {
            line += &format!(", {name} {:?}", rows.shape);
        }
        if let Some(beside) = beside {
            line += &format!("; names in {}", beside.display());
        }
        print(&format!("{line}\n"))?;
    }
    Ok(0)
}

/// What is to be embedded: of the arguments behind the model, texts from a file and a raw tensor exactly one.
fn inputs(args: &EmbedArgs, given: &[String]) -> Result<Inputs, RunError> {
    let nothing_beside = |option: &str| match given.first() {
        Some(other) => Err(RunError::Usage(format!("`{other}` is one input too many beside {option}"))),
        None => Ok(()),
    };
    if let Some(file) = &args.raw {
        nothing_beside("--raw")?;
        return Ok(Inputs::Raw(file.clone()));
    }
    if let Some(file) = &args.texts_from {
        nothing_beside("--texts-from")?;
        let texts = lines(file, "the texts, one a line")?;
        if texts.is_empty() {
            return Err(RunError::Usage(format!("{} holds no text", file.display())));
        }
        return Ok(Inputs::Texts(texts));
    }
    match (given, args.texts) {
        ([], true) => Err(RunError::Usage("give texts behind the model".into())),
        ([], false) => Err(RunError::Usage("give images behind the model, or texts by --texts or --texts-from".into())),
        (texts, true) => Ok(Inputs::Texts(texts.to_vec())),
        (images, false) => Ok(Inputs::Images(images.to_vec())),
    }
}
