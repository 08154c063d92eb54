//! Names of a pipeline file resolved to the things meant: data files and models. What does not fit is reported at its
//! line; nothing is computed here and no data is read.

pub mod data;
pub mod models;

pub use data::{EvalData, EvalSource, TrainSource};
pub use models::{Models, StudentText, TeacherModel, TextSide};
