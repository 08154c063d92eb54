//! Errors about data. Each names the file, the shard and the sample key that it is about.

use std::io;
use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T, E = DataError> = std::result::Result<T, E>;

/// Everything that can go wrong between a path in a pipeline file and a batch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file or directory could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// What was being read.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file or directory could not be written (full disk, read-only directory, ...).
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// What was being written.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A shard pattern whose braces cannot be expanded.
    #[error("shard pattern `{pattern}`: {reason}")]
    Braces {
        /// The pattern as given.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No shards were named, or a directory holds none.
    #[error("no shards: {0}")]
    NoShards(String),
    /// Shards that are named but not there.
    #[error("{} of {total} shards missing: {}", missing.len(), list_paths(missing))]
    MissingShards {
        /// Number of shards named.
        total: usize,
        /// Those that are not there.
        missing: Vec<PathBuf>,
    },
    /// `nshards.txt` is not there; without it the number of shards is a guess.
    #[error("{} is missing; `mcpipe data index {}` writes it", path.display(), parent(path).display())]
    MissingNshards {
        /// Where it should be.
        path: PathBuf,
    },
    /// `nshards.txt` does not hold one positive integer.
    #[error("{}: expected one positive integer, found `{found}`", path.display())]
    BadNshards {
        /// The file.
        path: PathBuf,
        /// Its content, shortened.
        found: String,
    },
    /// A shard whose structure is damaged as a whole.
    #[error("shard {}: {fault}", shard.display())]
    Shard {
        /// The tar file.
        shard: PathBuf,
        /// What is wrong.
        fault: ShardFault,
    },
    /// One sample that cannot be used.
    #[error("shard {}, sample `{key}`: {fault}", shard.display())]
    Sample {
        /// The tar file.
        shard: PathBuf,
        /// The sample's key.
        key: String,
        /// What is wrong.
        fault: SampleFault,
    },
    /// An image file that cannot be used.
    #[error("image {}: {fault}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        fault: ImageFault,
    },
    /// More samples were bad than `max_bad_samples` allows.
    #[error("{count} bad samples, {max} allowed; the first: {}", first.join("; "))]
    TooManyBadSamples {
        /// Distinct bad samples seen.
        count: usize,
        /// The cap.
        max: usize,
        /// Messages of the first few.
        first: Vec<String>,
    },
    /// Fewer usable samples than one batch holds.
    #[error("{samples} usable samples are fewer than one batch of {batch_size}")]
    TooFewSamples {
        /// Usable samples.
        samples: usize,
        /// Batch size asked for.
        batch_size: usize,
    },
    /// A text file of an evaluation set that is not there.
    #[error("{} is missing: {what}", path.display())]
    MissingFile {
        /// Where it should be.
        path: PathBuf,
        /// What it is for.
        what: &'static str,
    },
    /// A line of a text file that cannot be used.
    #[error("{}:{line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// An option out of range.
    #[error("{0}")]
    Option(String),
    /// A worker thread could not be started or ended without a result.
    #[error("loader thread: {0}")]
    Worker(String),
    /// A data set that was asked to be made exists already and is another one.
    #[error("{} exists already and {reason}", path.display())]
    Exists {
        /// The directory.
        path: PathBuf,
        /// Why it is not taken as it is.
        reason: String,
    },
}

/// What can be wrong with a whole tar file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShardFault {
    /// Zero bytes, or nothing but an end marker.
    #[error("the tar holds no members")]
    Empty,
    /// Starts like gzip, zstd, xz or bzip2.
    #[error("the tar is compressed ({0}); samples cannot be read at random from it, unpack it first")]
    Compressed(&'static str),
    /// The bytes at this offset are not a tar header.
    #[error("no tar header at byte {offset}: {reason}")]
    BadHeader {
        /// Byte offset in the file.
        offset: u64,
        /// What does not fit.
        reason: String,
    },
    /// The file ends inside a member.
    #[error("truncated: member `{member}` ends at byte {needs}, the file at {has}")]
    Truncated {
        /// Name of the member that is cut.
        member: String,
        /// Byte offset one past its end.
        needs: u64,
        /// Bytes in the file.
        has: u64,
    },
    /// The file ends without the two zero blocks that close a tar.
    #[error("truncated: no end-of-archive marker after member `{member}` (byte {at})")]
    NoEnd {
        /// Name of the last member.
        member: String,
        /// Where the marker should stand.
        at: u64,
    },
    /// PAX and ustar headers of a member disagree on its size: readers would see different members.
    #[error("member `{member}`: its PAX header says {pax} bytes, its ustar header {ustar}")]
    SizeDisagreement {
        /// The member.
        member: String,
        /// Size in the PAX record.
        pax: u64,
        /// Size in the ustar header.
        ustar: u64,
    },
    /// A member of a kind that has no place in a shard of samples.
    #[error("member `{member}`: {reason}")]
    Unsupported {
        /// The member.
        member: String,
        /// Which kind.
        reason: &'static str,
    },
}

/// What can be wrong with one sample.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SampleFault {
    /// Members of one key stand apart from each other.
    #[error("its members are not adjacent (`{member}` stands apart)")]
    NotAdjacent {
        /// First member of the second group.
        member: String,
    },
    /// The same extension twice.
    #[error("two members with the extension `{0}`")]
    Duplicate(String),
    /// No image among the members.
    #[error("no image (jpg, jpeg, png or webp) among its members: {}", .0.join(", "))]
    NoImage(Vec<String>),
    /// More than one image among the members.
    #[error("{0} images in one sample")]
    ManyImages(usize),
    /// No caption where one is needed.
    #[error("no caption (txt)")]
    NoCaption,
    /// A caption without a printable character.
    #[error("the caption is empty")]
    EmptyCaption,
    /// A caption that is not UTF-8.
    #[error("the caption is not UTF-8 (byte {0})")]
    CaptionNotUtf8(usize),
    /// A text member too large to be a caption.
    #[error("the {what} has {bytes} bytes, {max} allowed")]
    TextTooLarge {
        /// Which member.
        what: &'static str,
        /// Its size.
        bytes: u64,
        /// The cap.
        max: u64,
    },
    /// No class index where one is needed.
    #[error("no class index (cls)")]
    NoClass,
    /// A class index that is not an integer.
    #[error("the class index `{0}` is not a non-negative integer")]
    BadClass(String),
    /// A class index beyond the list of classes.
    #[error("class index {class}, but the class list has {classes} names")]
    ClassOutOfRange {
        /// The index in the `.cls` member.
        class: u32,
        /// Length of the list.
        classes: usize,
    },
    /// A `.json` member that does not parse.
    #[error("its json does not parse: {0}")]
    BadJson(String),
    /// The image cannot be decoded.
    #[error(transparent)]
    Image(#[from] ImageFault),
    /// The shard's bytes could not be read.
    #[error("read failed: {0}")]
    Read(String),
}

/// What can be wrong with one image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageFault {
    /// Neither JPEG nor PNG nor WebP by its first bytes.
    #[error("not a JPEG, PNG or WebP image")]
    UnknownFormat,
    /// The header declares more pixels than allowed; nothing was allocated.
    #[error("image of {width}x{height} pixels, {max_pixels} allowed in all")]
    TooLarge {
        /// Declared width in pixels.
        width: usize,
        /// Declared height in pixels.
        height: usize,
        /// The budget in pixels.
        max_pixels: u64,
    },
    /// Zero width or height.
    #[error("image of {width}x{height} pixels")]
    NoPixels {
        /// Declared width in pixels.
        width: usize,
        /// Declared height in pixels.
        height: usize,
    },
    /// The decoder rejects the bytes.
    #[error("corrupt {format} image: {reason}")]
    Corrupt {
        /// "JPEG", "PNG" or "WebP".
        format: &'static str,
        /// The decoder's words.
        reason: String,
    },
}

impl DataError {
    /// A short, stable name of the kind of error, as printed by `--format json`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Read { .. } => "data::read",
            Self::Write { .. } => "data::write",
            Self::Braces { .. } => "data::braces",
            Self::NoShards(_) => "data::no_shards",
            Self::MissingShards { .. } => "data::missing_shards",
            Self::MissingNshards { .. } => "data::missing_nshards",
            Self::BadNshards { .. } => "data::bad_nshards",
            Self::Shard { fault, .. } => fault.code(),
            Self::Sample { fault, .. } => fault.code(),
            Self::Image { fault, .. } => fault.code(),
            Self::TooManyBadSamples { .. } => "data::too_many_bad_samples",
            Self::TooFewSamples { .. } => "data::too_few_samples",
            Self::MissingFile { .. } => "data::missing_file",
            Self::Line { .. } => "data::bad_line",
            Self::Option(_) => "data::option",
            Self::Worker(_) => "data::worker",
            Self::Exists { .. } => "data::exists",
        }
    }

    /// The file or directory that the error is about (empty where it is about none) and the sample's key.
    pub fn place(&self) -> (&Path, Option<&str>) {
        match self {
            Self::Read { path, .. }
            | Self::Write { path, .. }
            | Self::MissingNshards { path }
            | Self::BadNshards { path, .. }
            | Self::MissingFile { path, .. }
            | Self::Line { path, .. }
            | Self::Exists { path, .. }
            | Self::Image { path, .. }
            | Self::Shard { shard: path, .. } => (path, None),
            Self::Sample { shard, key, .. } => (shard, Some(key)),
            Self::MissingShards { missing, .. } => (missing.first().map_or(Path::new(""), PathBuf::as_path), None),
            Self::Braces { pattern, .. } => (Path::new(pattern), None),
            Self::NoShards(_)
            | Self::TooManyBadSamples { .. }
            | Self::TooFewSamples { .. }
            | Self::Option(_)
            | Self::Worker(_) => (Path::new(""), None),
        }
    }

    pub(crate) fn read(path: &Path, source: io::Error) -> Self {
        Self::Read { path: path.to_owned(), source }
    }

    pub(crate) fn write(path: &Path, source: io::Error) -> Self {
        Self::Write { path: path.to_owned(), source }
    }

    pub(crate) fn shard(shard: &Path, fault: ShardFault) -> Self {
        Self::Shard { shard: shard.to_owned(), fault }
    }

    pub(crate) fn sample(shard: &Path, key: &str, fault: SampleFault) -> Self {
        Self::Sample { shard: shard.to_owned(), key: key.to_owned(), fault }
    }
}

impl ShardFault {
    /// A short, stable name of the kind of fault.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Empty => "data::tar_empty",
            Self::Compressed(_) => "data::tar_compressed",
            Self::BadHeader { .. } => "data::tar_header",
            Self::Truncated { .. } | Self::NoEnd { .. } => "data::tar_truncated",
            Self::SizeDisagreement { .. } => "data::tar_size_disagreement",
            Self::Unsupported { .. } => "data::tar_unsupported",
        }
    }
}

impl SampleFault {
    /// A short, stable name of the kind of fault.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotAdjacent { .. } => "data::not_adjacent",
            Self::Duplicate(_) => "data::duplicate_member",
            Self::NoImage(_) => "data::no_image",
            Self::ManyImages(_) => "data::many_images",
            Self::NoCaption => "data::no_caption",
            Self::EmptyCaption => "data::empty_caption",
            Self::CaptionNotUtf8(_) => "data::caption_not_utf8",
            Self::TextTooLarge { .. } => "data::text_too_large",
            Self::NoClass => "data::no_class",
            Self::BadClass(_) => "data::bad_class",
            Self::ClassOutOfRange { .. } => "data::class_out_of_range",
            Self::BadJson(_) => "data::bad_json",
            Self::Image(fault) => fault.code(),
            Self::Read(_) => "data::read",
        }
    }
}

impl ImageFault {
    /// A short, stable name of the kind of fault.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnknownFormat => "data::image_format",
            Self::TooLarge { .. } => "data::image_too_large",
            Self::NoPixels { .. } => "data::image_no_pixels",
            Self::Corrupt { .. } => "data::image_corrupt",
        }
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

/// Every missing shard is named up to a page of them; beyond that the count has to do.
fn list_paths(paths: &[PathBuf]) -> String {
    const SHOWN: usize = 50;
    let mut text = paths.iter().take(SHOWN).map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ");
    if paths.len() > SHOWN {
        text.push_str(&format!(" and {} more", paths.len() - SHOWN));
    }
    text
}
