//! Images of files, folders and shards in the order named: what is to be embedded or classified.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::decode::{DEFAULT_MAX_PIXELS, decode};
use crate::error::{DataError, Result};
use crate::ordered::{Job, Ordered, StopFlag};
use crate::samples::{MAX_IMAGE_BYTES, SampleSet, ShardFiles};
use crate::shards::{NSHARDS, expand_braces, list_shards};
use crate::transform::{EvalTransform, Resize};

/// Extensions of image files that are looked for in folders.
const EXTENSIONS: [&str; 4] = ["jpg", "jpeg", "png", "webp"];

/// A list of images.
#[derive(Debug, Clone)]
pub struct ImageList {
    items: Arc<[Item]>,
    samples: Arc<SampleSet>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Item {
    File(PathBuf),
    /// Index in the samples of all shards.
    Sample(usize),
}

/// A path that was named or found.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Image(PathBuf),
    Shard(PathBuf),
}

impl ImageList {
    /// The images that `inputs` name, each a file, a folder, a shard (`.tar`), or several by braces (`{00..07}.tar`).
    /// A file that is named is taken as an image whatever its extension; of a folder, images and shards are taken,
    /// folders below included, sorted by name (the shards of a split by `nshards.txt`). Hidden files are left out.
    ///
    /// # Errors
    /// [`DataError::Read`] for what is not there, [`DataError::NoShards`] for a folder with neither images nor shards
    /// or a shard without samples, [`DataError::Sample`] for the first unusable sample, and what [`SampleSet::open`]
    /// and [`expand_braces`] say.
    pub fn open<S: AsRef<str>>(inputs: &[S]) -> Result<Self> {
        let mut found = Vec::new();
        for input in inputs {
            let input = input.as_ref();
            // A file may have braces in its name.
            let paths = if Path::new(input).exists() { vec![input.to_owned()] } else { expand_braces(input)? };
            for path in paths {
                take(PathBuf::from(path), &mut found)?;
            }
        }
        let shards = found.iter().filter_map(|f| match f {
            Found::Shard(path) => Some(path.clone()),
            Found::Image(_) => None,
        });
        let samples = SampleSet::open(shards.collect())?;
        if let Some(error) = samples.bad_errors().next() {
            return Err(error);
        }
        let (mut items, mut shard, mut next) = (Vec::new(), 0, 0);
        for f in found {
            let path = match f {
                Found::Image(path) => {
                    items.push(Item::File(path));
                    continue;
                }
                Found::Shard(path) => path,
            };
            let rest = &samples.entries()[next..];
            let count = rest.iter().take_while(|entry| entry.shard == shard).count();
            if count == 0 {
                return Err(DataError::NoShards(format!("{} has no samples", path.display())));
            }
            items.extend((next..next + count).map(Item::Sample));
            next += count;
            shard += 1;
        }
        Ok(Self { items: items.into(), samples: Arc::new(samples) })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is no image.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// A name for each image: the file's path, or the shard's path and the sample's key with a colon between.
    pub fn names(&self) -> Vec<String> {
        let name = |item: &Item| match item {
            Item::File(path) => path.display().to_string(),
            Item::Sample(index) => {
                let entry = &self.samples.entries()[*index];
                format!("{}:{}", self.samples.shards()[entry.shard as usize].display(), entry.key)
            }
        };
        self.items.iter().map(name).collect()
    }

    /// Starts reading the images in order.
    ///
    /// # Errors
    /// [`DataError::Option`].
    pub fn read(&self, options: &ImageOptions) -> Result<ImageReader> {
        if options.batch_size == 0 || options.workers == 0 {
            return Err(DataError::Option("images: batch size and workers must not be zero".into()));
        }
        options.transform.check()?;
        let jobs = (0..options.workers).map(|_| {
            let mut maker = Maker {
                list: self.clone(),
                options: options.clone(),
                files: ShardFiles::default(),
                resize: Resize::default(),
            };
            Box::new(move |number: u64, stop: &StopFlag| maker.batch(number, stop)) as Job<_>
        });
        let batches = self.len().div_ceil(options.batch_size) as u64;
        Ok(ImageReader(Ordered::start(jobs.collect(), options.workers * 2, 0, batches)?))
    }
}

/// Adds what `path` stands for.
fn take(path: PathBuf, found: &mut Vec<Found>) -> Result<()> {
    let meta = fs::metadata(&path).map_err(|e| DataError::read(&path, e))?;
    if meta.is_dir() {
        let before = found.len();
        walk(&path, found)?;
        if found.len() == before {
            let path = path.display();
            return Err(DataError::NoShards(format!("{path} holds neither images (jpg, jpeg, png, webp) nor shards")));
        }
    } else {
        found.push(if has_extension(&path, &["tar"]) { Found::Shard(path) } else { Found::Image(path) });
    }
    Ok(())
}

fn walk(dir: &Path, found: &mut Vec<Found>) -> Result<()> {
    if dir.join(NSHARDS).is_file() {
        let shards = list_shards(&[dir.to_string_lossy()])?;
        found.extend(shards.into_iter().map(Found::Shard));
        return Ok(());
    }
    let entries = fs::read_dir(dir).and_then(|entries| entries.collect::<std::io::Result<Vec<_>>>());
    let mut entries = entries.map_err(|e| DataError::read(dir, e))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        // Folders behind links are left out: they may lead in a circle.
        if entry.file_type().map_err(|e| DataError::read(&path, e))?.is_dir() {
            walk(&path, found)?;
        } else if has_extension(&path, &EXTENSIONS) && path.is_file() {
            found.push(Found::Image(path));
        } else if has_extension(&path, &["tar"]) && path.is_file() {
            found.push(Found::Shard(path));
        }
    }
    Ok(())
}

fn has_extension(path: &Path, known: &[&str]) -> bool {
    path.extension().is_some_and(|e| known.iter().any(|k| e.eq_ignore_ascii_case(k)))
}

/// Options of reading a list of images.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageOptions {
    /// The model's transform.
    pub transform: EvalTransform,
    /// Images of a batch; the last batch may have fewer.
    pub batch_size: usize,
    /// Threads that decode.
    pub workers: usize,
    /// Pixel budget of one image.
    pub max_pixels: u64,
}

impl ImageOptions {
    /// Options with defaults: batches of 32, two threads.
    pub fn new(transform: EvalTransform) -> Self {
        Self { transform, batch_size: 32, workers: 2, max_pixels: DEFAULT_MAX_PIXELS }
    }
}

/// Reads a list batch by batch, in order; an iterator over RGB bytes `[rows, size, size, 3]`. The first image that
/// cannot be used ends it with an error that names the image.
pub struct ImageReader(Ordered<Vec<u8>>);

impl Iterator for ImageReader {
    type Item = Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next()
    }
}

struct Maker {
    list: ImageList,
    options: ImageOptions,
    files: ShardFiles,
    resize: Resize,
}

impl Maker {
    fn batch(&mut self, number: u64, stop: &StopFlag) -> Result<Vec<u8>> {
        let items = Arc::clone(&self.list.items);
        let first = number as usize * self.options.batch_size;
        let rows = &items[first..(first + self.options.batch_size).min(items.len())];
        let bytes = self.options.transform.size.pow(2) * 3;
        let mut pixels = vec![0; rows.len() * bytes];
        for (item, out) in rows.iter().zip(pixels.chunks_exact_mut(bytes)) {
            if stop.is_set() {
                return Err(DataError::Worker("stopped".into()));
            }
            self.image(item, out)?;
        }
        Ok(pixels)
    }

    fn image(&mut self, item: &Item, out: &mut [u8]) -> Result<()> {
        let max = self.options.max_pixels;
        let image = match item {
            Item::File(path) => {
                let bytes = read_file(path).map_err(|e| DataError::read(path, e))?;
                decode(&bytes, max).map_err(|fault| DataError::Image { path: path.clone(), fault })?
            }
            Item::Sample(index) => {
                let samples = &self.list.samples;
                let bytes = samples.read_image(*index, &mut self.files);
                let image = bytes.and_then(|bytes| Ok(decode(&bytes, max)?));
                image.map_err(|fault| samples.fault(*index, fault))?
            }
        };
        self.resize.eval(&image, &self.options.transform, out)
    }
}

/// What a file holds, as far as an image may go: a device would never end.
fn read_file(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_IMAGE_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_walked_in_order_of_names() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.PNG", "a/z.jpg", "a/b.webp", "a/notes.txt", ".hidden.png", "c.tar", "split/nshards.txt"] {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, if name.ends_with("nshards.txt") { "11" } else { "" }).unwrap();
        }
        for i in 0..11 {
            fs::write(dir.path().join(format!("split/{i}.tar")), "").unwrap();
        }
        let mut found = Vec::new();
        take(dir.path().to_owned(), &mut found).unwrap();
        let image = |name: &str| Found::Image(dir.path().join(name));
        assert_eq!(
            found[..4],
            [image("a/b.webp"), image("a/z.jpg"), image("b.PNG"), Found::Shard(dir.path().join("c.tar"))]
        );
        assert_eq!(found.len(), 4 + 11);
        assert_eq!(found[4 + 2], Found::Shard(dir.path().join("split/2.tar")), "in the split's order");
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(take(empty.path().to_owned(), &mut found), Err(DataError::NoShards(_))));
    }

    #[test]
    fn what_is_not_an_image_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("broken.png");
        fs::write(&path, b"\x89PNG\r\n\x1a\n").unwrap();
        let list = ImageList::open(&[path.to_str().unwrap()]).unwrap();
        assert_eq!((list.len(), list.names()), (1, vec![path.display().to_string()]));
        let mut read = list.read(&ImageOptions::new(EvalTransform::new(8))).unwrap();
        match read.next() {
            Some(Err(DataError::Image { path: named, .. })) => assert_eq!(named, path),
            other => panic!("{other:?}"),
        }
        assert!(read.next().is_none());
        assert!(matches!(ImageList::open(&["none/{0..3}.png"]), Err(DataError::Read { .. })));
    }
}
