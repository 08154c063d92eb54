//! From the tables of teachers, student, text and projection to models that can be built.

use std::sync::Arc;

use mcpipe_data::{CaptionTokenizer, WordPiece};
use mcpipe_graph::{GraphBuilder, Path, Tensor};
use mcpipe_models::projection::{Projection, ProjectionKind};
use mcpipe_models::{Backbone, LastToken, ModelError, Naming, TextEncoder, Vocabulary};
use mcpipe_spec::{Code, Diagnostic, Document, Params, Teacher, TeacherKind, TeacherText, TextEncoder as TextSpec};
use mcpipe_train::{BackboneTower, EncoderTower, Head};

/// Path of the projection's parameters.
pub const PROJECTION: &str = "projection";
/// Path of text towers' parameters.
pub const TEXT: &str = "text";

/// A model's text side.
#[derive(Clone, Debug)]
pub enum TextSide {
    /// A tower of its own.
    Own(EncoderTower),
    /// The tower of another teacher, by its position in the pipeline.
    Of(usize),
}

/// A teacher that can be built. The student's average has neither tower: both are the student's.
#[derive(Clone, Debug)]
pub struct TeacherModel {
    /// Its name.
    pub name: String,
    /// How it comes about.
    pub kind: TeacherKind,
    /// Image tower.
    pub image: Option<BackboneTower>,
    /// Text side.
    pub text: Option<TextSide>,
}

/// Whose text tower the student's text embeddings come from.
#[derive(Clone, Debug)]
pub enum StudentText {
    /// A teacher's, by its position in the pipeline.
    Teacher(usize),
    /// One with weights from a file.
    File(EncoderTower, std::path::PathBuf),
}

/// The student.
#[derive(Clone, Debug)]
pub struct StudentModel {
    /// Image tower with its projection.
    pub image: BackboneTower,
    /// Projection and, where the text embedding goes through it too, that.
    pub projection: Option<(Projection, bool)>,
    /// Text side.
    pub text: StudentText,
    /// The text tower.
    pub text_tower: EncoderTower,
}

/// All models of a pipeline.
#[derive(Clone, Debug)]
pub struct Models {
    /// Teachers, in the pipeline's order.
    pub teachers: Vec<TeacherModel>,
    /// The student.
    pub student: StudentModel,
}

/// The projection as a part of a tower.
#[derive(Clone, Copy, Debug)]
pub struct ProjectionHead(pub Projection);

impl Head for ProjectionHead {
    fn dim(&self) -> usize {
        self.0.dim
    }

    fn build(&self, g: &mut GraphBuilder, x_bd: &Tensor) -> Result<Tensor, ModelError> {
        // dfdx runs the dense algebra on embeddings.
        g.on_dfdx(|g| self.0.build(g, &Path::new(PROJECTION), x_bd))
    }
}

impl StudentModel {
    /// The map that the text embedding goes through, where it shares the image side's.
    pub fn text_head(&self) -> Option<Arc<dyn Head>> {
        match self.projection {
            Some((projection, true)) => Some(Arc::new(ProjectionHead(projection))),
            _ => None,
        }
    }
}

/// Where a backbone's parameters lie: as in open_clip, so that a weight file needs no map.
pub fn image_path(backbone: &dyn Backbone) -> &'static str {
    match backbone.naming() {
        Naming::Timm => "visual.trunk",
        Naming::OpenClip => "visual",
    }
}

impl Models {
    /// The models of a pipeline; nothing where one can't be built, with the reasons in `found`.
    pub fn resolve(document: &Document, found: &mut Vec<Diagnostic>) -> Option<Self> {
        let spec = &document.spec;
        let teachers: Vec<Option<TeacherModel>> = spec
            .teachers
            .iter()
            .enumerate()
            .map(|(at, teacher)| resolve_teacher(document, at, teacher, found))
            .collect();
        let image =
            tower(document, "student", &spec.student.backbone, spec.student.image_size, &spec.student.params, found);
        let own = match &spec.text {
            TextSpec::Own(own) => {
                Some(text_tower(document, "text", (&own.encoder, &own.params, own.vocab.as_deref()), own.dim, found))
            }
            TextSpec::Teacher(_) => None,
        };
        let teachers: Vec<TeacherModel> = teachers.into_iter().collect::<Option<_>>()?;
        let (text, text_tower) = match (&spec.text, own) {
            (TextSpec::Own(own), Some(tower)) => {
                let tower = tower?;
                (StudentText::File(tower.clone(), own.weights.clone()), tower)
            }
            (TextSpec::Teacher(text), _) => {
                let at = teachers.iter().position(|teacher| teacher.name == text.teacher)?;
                (StudentText::Teacher(at), owner(&teachers, at)?.1.clone())
            }
            (TextSpec::Own(_), None) => return None,
        };
        let image = image?;
        let student = student(document, image, text, text_tower, found)?;
        Some(Self { teachers, student })
    }

    /// The text tower of a teacher and the position of the teacher that it belongs to.
    pub fn text_of(&self, teacher: usize) -> Option<(usize, &EncoderTower)> {
        owner(&self.teachers, teacher)
    }
}

/// Follows `text = { teacher = ".." }` to the teacher whose tower it is. Circles were refused before.
fn owner(teachers: &[TeacherModel], mut at: usize) -> Option<(usize, &EncoderTower)> {
    for _ in 0..teachers.len() {
        match teachers.get(at)?.text.as_ref()? {
            TextSide::Own(tower) => return Some((at, tower)),
            TextSide::Of(other) => at = *other,
        }
    }
    None
}

fn resolve_teacher(
    document: &Document,
    at: usize,
    teacher: &Teacher,
    found: &mut Vec<Diagnostic>,
) -> Option<TeacherModel> {
    let path = format!("teacher[{at}]");
    let dim = teacher.dim().unwrap_or_default();
    let image = match teacher.image() {
        Some(t) => {
            let image = tower(document, &format!("{path}.image"), &t.backbone, t.image_size, &t.params, found);
            Some(image.map(|tower| BackboneTower { head: Some(dim), ..tower }))
        }
        None => None,
    };
    let text = match teacher.text() {
        Some(TeacherText::Own(t)) => {
            let parts = (t.encoder.as_str(), &t.params, t.vocab.as_deref());
            Some(text_tower(document, &format!("{path}.text"), parts, dim, found).map(TextSide::Own))
        }
        Some(TeacherText::Teacher(of)) => {
            let other = document.spec.teachers.iter().position(|t| t.name() == of.teacher);
            let other_dim = other.and_then(|o| document.spec.teachers[o].dim());
            if let Some(other_dim) = other_dim
                && other_dim != dim
            {
                let path = if document.is_set(&format!("{path}.dim")) { format!("{path}.dim") } else { path.clone() };
                found.push(document.dim_mismatch(
                    &path,
                    (&format!("teacher `{}`", teacher.name()), dim),
                    (&format!("the text tower of `{}`", of.teacher), other_dim),
                    &format!("a teacher that takes its text tower from another has its dimension: `dim = {other_dim}`"),
                ));
            }
            Some(other.map(TextSide::Of))
        }
        None => None,
    };
    Some(TeacherModel {
        name: teacher.name().to_owned(),
        kind: teacher.kind(),
        image: match image {
            Some(image) => Some(image?),
            None => None,
        },
        text: match text {
            Some(text) => Some(text?),
            None => None,
        },
    })
}

/// An image tower without head or projection, its image size checked.
fn tower(
    document: &Document,
    path: &str,
    name: &str,
    size: usize,
    params: &Params,
    found: &mut Vec<Diagnostic>,
) -> Option<BackboneTower> {
    let backbone = match mcpipe_models::backbone(name, &params.0) {
        Ok(backbone) => backbone,
        Err(error) => {
            found.push(of_model(document, path, "backbone", name, &error));
            return None;
        }
    };
    if let Err(error) = backbone.check_image_size(size) {
        let form = match error {
            ModelError::ImageSize { message, .. } => message,
            other => other.to_string(),
        };
        let path = format!("{path}.image_size");
        let diagnostic = document.image_size(&path, name, size, "another size").with_label(form);
        found.push(match nearest_sizes(backbone.as_ref(), size).as_slice() {
            [] => diagnostic,
            sizes => diagnostic.with_help(format!(
                "for example `image_size = {}`",
                sizes.iter().map(usize::to_string).collect::<Vec<_>>().join("` or `image_size = ")
            )),
        });
        return None;
    }
    let path = Path::new(image_path(backbone.as_ref()));
    Some(BackboneTower { backbone: backbone.into(), path, image_size: size, head: None, projection: None })
}

/// The next smaller and the next greater size that a backbone takes.
fn nearest_sizes(backbone: &dyn Backbone, size: usize) -> Vec<usize> {
    let fits = |s: &usize| backbone.check_image_size(*s).is_ok();
    let below = (size.saturating_sub(512).max(8)..size).rev().find(fits);
    let above = (size + 1..=size.saturating_add(512).min(4096)).find(fits);
    below.into_iter().chain(above).collect()
}

fn text_tower(
    document: &Document,
    path: &str,
    (name, params, vocab): (&str, &Params, Option<&std::path::Path>),
    dim: usize,
    found: &mut Vec<Diagnostic>,
) -> Option<EncoderTower> {
    let encoder: Arc<dyn TextEncoder> = match mcpipe_models::text_encoder(name, &params.0) {
        Ok(encoder) => encoder.into(),
        Err(error) => {
            found.push(of_model(document, path, "encoder", name, &error));
            return None;
        }
    };
    let tokenizer = match tokenizer(document, path, name, encoder.vocabulary(), vocab) {
        Ok(tokenizer) => tokenizer,
        Err(diagnostic) => {
            found.push(*diagnostic);
            return None;
        }
    };
    if encoder.vocab_size() < tokenizer.len() {
        let (known, needed) = (encoder.vocab_size(), tokenizer.len());
        let message = format!("`{name}` knows {known} token ids, but the tokenizer has {needed}");
        let place = format!("{path}.params.vocab_size");
        let place = if document.is_set(&place) { place } else { format!("{path}.encoder") };
        let help = format!("set `params = {{ vocab_size = {needed} }}`");
        found.push(document.diagnostic(Code::BadParams, &place, message).with_label("too few").with_help(help));
        return None;
    }
    if let (LastToken::BeforePadding(id), CaptionTokenizer::WordPiece { vocabulary, .. }) =
        (encoder.last_token(), &tokenizer)
        && id != vocabulary.padding()
    {
        let padding = vocabulary.padding();
        let message = format!("`{name}` takes the id {id} for padding, but the vocabulary's `[PAD]` is {padding}");
        let place = format!("{path}.params.padding_id");
        let place = if document.is_set(&place) { place } else { format!("{path}.vocab") };
        let help = format!("set `params = {{ padding_id = {padding} }}`");
        found.push(document.diagnostic(Code::BadParams, &place, message).with_label("another id").with_help(help));
        return None;
    }
    Some(EncoderTower { encoder, path: Path::new(TEXT), dim, tokenizer })
}

/// The tokenizer that an encoder was made for, its vocabulary read where it has one of its own.
fn tokenizer(
    document: &Document,
    path: &str,
    name: &str,
    reads: Vocabulary,
    vocab: Option<&std::path::Path>,
) -> Result<CaptionTokenizer, Box<Diagnostic>> {
    let place = format!("{path}.vocab");
    match (reads, vocab) {
        (Vocabulary::Clip, None) => Ok(CaptionTokenizer::Clip),
        (Vocabulary::Clip, Some(_)) => {
            let message = format!("`{name}` reads CLIP's vocabulary, which is built in");
            let diagnostic = document.diagnostic(Code::Unused, &place, message);
            Err(Box::new(diagnostic.with_label("not used").with_help("remove it")))
        }
        (Vocabulary::WordPiece { .. }, None) => {
            let message = format!("`{name}` needs its vocabulary");
            let diagnostic = document.diagnostic(Code::MissingKey, &format!("{path}.encoder"), message);
            let help = "name the file that came with its weights: `vocab = \"vocab.txt\"`";
            Err(Box::new(diagnostic.with_label("`vocab` is missing").with_help(help)))
        }
        (Vocabulary::WordPiece { .. }, Some(file)) if !file.exists() => {
            Err(Box::new(document.missing_file(&place, "vocabulary", file)))
        }
        (Vocabulary::WordPiece { lowercase }, Some(file)) => match WordPiece::open(file, lowercase) {
            Ok(vocabulary) => {
                Ok(CaptionTokenizer::WordPiece { path: file.to_owned(), vocabulary: Arc::new(vocabulary) })
            }
            Err(error) => {
                let diagnostic = document.diagnostic(Code::BadFile, &place, error.to_string());
                Err(Box::new(diagnostic.with_label("cannot be used")))
            }
        },
    }
}

fn student(
    document: &Document,
    mut image: BackboneTower,
    text: StudentText,
    text_tower: EncoderTower,
    found: &mut Vec<Diagnostic>,
) -> Option<StudentModel> {
    let settings = &document.spec.projection;
    let (features, text_dim) = (image.backbone.features(), text_tower.dim);
    let dim = settings.dim.unwrap_or(text_dim);
    let place = |keys: &[&str]| {
        let written = keys.iter().find(|key| document.is_set(key)).or(keys.last());
        written.copied().unwrap_or_default().to_owned()
    };
    let kind = match settings.kind {
        mcpipe_spec::ProjectionKind::None => {
            if features != text_dim {
                let name = document.spec.student.backbone.as_str();
                found.push(document.dim_mismatch(
                    &place(&["projection.kind", "student.backbone"]),
                    (&format!("the embedding of `{name}`"), features),
                    ("the text embedding", text_dim),
                    "join them by a projection: `projection = { kind = \"linear\" }`",
                ));
                return None;
            }
            ProjectionKind::None
        }
        mcpipe_spec::ProjectionKind::Linear => ProjectionKind::Linear,
        mcpipe_spec::ProjectionKind::Mlp => ProjectionKind::Mlp { hidden: settings.hidden.unwrap_or(dim) },
    };
    if kind == ProjectionKind::None {
        return Some(StudentModel { image, projection: None, text, text_tower });
    }
    if !settings.shared && dim != text_dim {
        found.push(document.dim_mismatch(
            &place(&["projection.dim", "projection.kind"]),
            ("the projection of the image embedding", dim),
            ("the text embedding", text_dim),
            &format!(
                "give the projection the text's dimension (`dim = {text_dim}`), or send the text through it as well \
                 (`shared = true`)"
            ),
        ));
        return None;
    }
    let projection = Projection { kind, dim };
    if settings.shared {
        // One map for both sides takes inputs of one width: the backbone's head brings the image side to the text's.
        image.head = Some(text_dim);
    }
    image.projection = Some(Arc::new(ProjectionHead(projection)));
    Some(StudentModel { image, projection: Some((projection, settings.shared)), text, text_tower })
}

/// A model's refusal at the line of the value that it is about. `path` is the table, `tag` its key of the name.
fn of_model(document: &Document, path: &str, tag: &str, name: &str, error: &ModelError) -> Diagnostic {
    match error {
        ModelError::Param { param, message, .. } => {
            let place = format!("{path}.params.{param}");
            let place = if document.is_set(&place) { place } else { format!("{path}.{tag}") };
            document.bad_params(&place, name, message).with_help(format!("parameters of `{name}`: `mcpipe list`"))
        }
        other => document.bad_params(&format!("{path}.{tag}"), name, other.to_string()),
    }
}
