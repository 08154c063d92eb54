//! The scan of tar headers: samples, and every kind of damage.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::{png, tar_bytes, write_tar};
use mcpipe_data::{DataError, SampleFault, SampleSet, ShardFault, ShardFiles, scan_tar};
use proptest::prelude::*;

fn scan(bytes: &[u8]) -> mcpipe_data::TarScan {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    scan_tar(file.path()).unwrap()
}

fn fault(bytes: &[u8]) -> ShardFault {
    scan(bytes).fault.unwrap()
}

fn two_samples() -> Vec<u8> {
    tar_bytes(&[("a.png", b"image a"), ("a.txt", b"text a"), ("b.png", b"image b"), ("b.txt", b"text b")])
}

#[test]
fn members_are_found_with_their_bytes() {
    let bytes = two_samples();
    let scan = scan(&bytes);
    assert_eq!(scan.fault, None);
    let found: Vec<(&str, &[u8])> = scan
        .members
        .iter()
        .map(|m| (m.name.as_str(), &bytes[m.offset as usize..(m.offset + m.size) as usize]))
        .collect();
    assert_eq!(found[0], ("a.png", &b"image a"[..]));
    assert_eq!(found[3], ("b.txt", &b"text b"[..]));
}

#[test]
fn long_names() {
    let long = format!("{}/{}.png", "d".repeat(120), "k".repeat(150));
    // GNU's long-name record.
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(3);
    tar.append_data(&mut header, &long, &b"abc"[..]).unwrap();
    assert_eq!(scan(&tar.into_inner().unwrap()).members[0].name, long);
    // PAX's.
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_pax_extensions([("path", long.as_bytes()), ("mtime", b"1.5")]).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_size(3);
    tar.append_data(&mut header, "short", &b"abc"[..]).unwrap();
    let scan = scan(&tar.into_inner().unwrap());
    assert_eq!((scan.members[0].name.as_str(), scan.members[0].size), (long.as_str(), 3));
}

#[test]
fn directories_and_links_are_no_members() {
    let mut tar = tar::Builder::new(Vec::new());
    for (kind, name) in [(tar::EntryType::Directory, "d/"), (tar::EntryType::Symlink, "l.png")] {
        let mut header = tar::Header::new_ustar();
        header.set_size(0);
        header.set_entry_type(kind);
        header.set_path(name).unwrap();
        header.set_cksum();
        tar.append(&header, &b""[..]).unwrap();
    }
    assert!(scan(&tar.into_inner().unwrap()).members.is_empty());
}

#[test]
fn empty_tars() {
    assert_eq!(fault(b""), ShardFault::Empty);
    assert_eq!(fault(&[0; 1024]), ShardFault::Empty);
    assert_eq!(fault(&tar_bytes(&[])), ShardFault::Empty);
}

#[test]
fn things_that_are_not_tars() {
    assert!(matches!(fault(b"hello"), ShardFault::BadHeader { offset: 0, .. }));
    assert!(matches!(fault(&[b'x'; 2000]), ShardFault::BadHeader { offset: 0, .. }));
    assert_eq!(fault(b"\x1f\x8b\x08rest"), ShardFault::Compressed("gzip"));
    let missing = scan_tar(Path::new("/nowhere/0.tar")).unwrap_err();
    assert_eq!(missing.code(), "data::read");
    assert!(missing.to_string().contains("/nowhere/0.tar"));
    assert!(scan_tar(Path::new("/")).is_err());
}

#[test]
fn truncated_tars() {
    let bytes = two_samples();
    // Inside the second member's data.
    match fault(&bytes[..1024 + 512 + 3]) {
        ShardFault::Truncated { member, needs, has } => {
            assert_eq!((member.as_str(), needs, has), ("a.txt", 1542, 1539))
        }
        other => panic!("{other:?}"),
    }
    // Between members, inside a header, inside the padding: the end marker is missing.
    for cut in [2048, 2048 + 100, 1600] {
        assert!(matches!(fault(&bytes[..cut]), ShardFault::NoEnd { .. }), "{cut}");
    }
    assert_eq!(scan(&bytes[..2048]).members.len(), 2);
    // One zero block is enough of an end.
    assert_eq!(scan(&bytes[..4096 + 512]).fault, None);
}

#[test]
fn disagreeing_sizes_are_rejected() {
    let make = |kind: &str| {
        let mut tar = tar::Builder::new(Vec::new());
        tar.append_pax_extensions([("size", &b"1024"[..])]).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_size(7);
        tar.append_data(&mut header, "a.png", &b"image a"[..]).unwrap();
        let mut bytes = tar.into_inner().unwrap();
        if kind == "global" {
            bytes[156] = b'g';
            let sum: u32 = bytes[..512]
                .iter()
                .enumerate()
                .map(|(i, &b)| if (148..156).contains(&i) { 32 } else { u32::from(b) })
                .sum();
            bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        bytes
    };
    for kind in ["local", "global"] {
        let expected = ShardFault::SizeDisagreement { member: "a.png".into(), pax: 1024, ustar: 7 };
        assert_eq!(fault(&make(kind)), expected, "{kind}");
    }
}

fn open(members: &[(&str, &[u8])]) -> (tempfile::TempDir, SampleSet) {
    let dir = tempfile::tempdir().unwrap();
    let set = SampleSet::open(vec![write_tar(&dir.path().join("0.tar"), members)]).unwrap();
    (dir, set)
}

#[test]
fn bad_samples_name_shard_and_key() {
    let image = png(2, 2, [0; 3]);
    let (_dir, set) = open(&[
        ("apart.png", &image),
        ("good.png", &image),
        ("good.txt", b"fine"),
        ("apart.txt", b"too late"),
        ("twice.png", &image),
        ("twice.png", &image),
        ("noimage.cls", b"3"),
        ("two.png", &image),
        ("two.jpg", &image),
        ("__meta.json", b"{}"),
        ("README", b"no extension"),
    ]);
    assert_eq!(set.len(), 1);
    let faults: Vec<(&str, &SampleFault)> = set.bad().iter().map(|b| (b.key.as_str(), &b.fault)).collect();
    assert_eq!(
        faults,
        [
            ("apart", &SampleFault::NotAdjacent { member: "apart.txt".into() }),
            ("twice", &SampleFault::Duplicate("png".into())),
            ("noimage", &SampleFault::NoImage(vec!["cls".into()])),
            ("two", &SampleFault::ManyImages(2)),
        ]
    );
    for (error, key) in set.bad_errors().zip(["apart", "twice", "noimage", "two"]) {
        let text = error.to_string();
        assert!(text.contains("0.tar") && text.contains(&format!("`{key}`")), "{text}");
    }
}

#[test]
fn members_are_read_and_checked() {
    let image = png(2, 2, [0; 3]);
    let long = "x".repeat(100_000);
    let (_dir, set) = open(&[
        ("a.png", &image),
        ("a.txt", b"\xef\xbb\xbf a caption\n"),
        ("a.cls", b" 12\n"),
        ("a.json", b"{\"k\": 1}"),
        ("b.png", &image),
        ("b.txt", b"caf\xe9"),
        ("b.cls", b"-1"),
        ("b.json", b"{"),
        ("c.png", &image),
        ("c.txt", b" \n"),
        ("c.cls", b"twelve"),
        ("d.png", &image),
        ("d.txt", long.as_bytes()),
    ]);
    let mut files = ShardFiles::default();
    assert_eq!(set.read_text(0, &mut files).unwrap().unwrap(), "a caption");
    assert_eq!(set.read_class(0, &mut files), Ok(Some(12)));
    assert_eq!(set.read_json(0, &mut files).unwrap().unwrap()["k"], 1);
    assert_eq!(set.read_image(0, &mut files).unwrap(), image);
    assert_eq!(set.read_text(1, &mut files), Err(SampleFault::CaptionNotUtf8(3)));
    assert_eq!(set.read_class(1, &mut files), Err(SampleFault::BadClass("-1".into())));
    assert!(matches!(set.read_json(1, &mut files), Err(SampleFault::BadJson(_))));
    assert_eq!(set.read_text(2, &mut files), Err(SampleFault::EmptyCaption));
    assert_eq!(set.read_class(2, &mut files), Err(SampleFault::BadClass("twelve".into())));
    assert!(matches!(set.read_text(3, &mut files), Err(SampleFault::TextTooLarge { .. })));
    assert_eq!(set.read_class(3, &mut files), Ok(None));
    assert_eq!(set.read_json(3, &mut files), Ok(None));
}

#[test]
fn a_shard_that_shrinks_or_goes_is_an_error() {
    let image = png(2, 2, [0; 3]);
    let (dir, set) = open(&[("a.png", &image)]);
    let shard = dir.path().join("0.tar");
    std::fs::write(&shard, b"").unwrap();
    assert!(matches!(set.read_image(0, &mut ShardFiles::default()), Err(SampleFault::Read(_))));
    std::fs::remove_file(&shard).unwrap();
    assert!(matches!(set.read_image(0, &mut ShardFiles::default()), Err(SampleFault::Read(_))));
}

#[test]
fn damaged_shards_are_errors_of_the_set() {
    let dir = tempfile::tempdir().unwrap();
    let good = write_tar(&dir.path().join("0.tar"), &[("a.png", b"x")]);
    let bad = dir.path().join("1.tar");
    std::fs::write(&bad, &two_samples()[..1300]).unwrap();
    match SampleSet::open(vec![good, bad.clone()]) {
        Err(DataError::Shard { shard, .. }) => assert_eq!(shard, bad),
        other => panic!("{other:?}"),
    }
}

#[test]
fn fingerprints_change_with_headers() {
    let dir = tempfile::tempdir().unwrap();
    let print = |members: &[(&str, &[u8])]| {
        SampleSet::open(vec![write_tar(&dir.path().join("0.tar"), members)]).unwrap().fingerprint()
    };
    let first = print(&[("a.png", b"x"), ("b.png", b"y")]);
    assert_eq!(first, print(&[("a.png", b"x"), ("b.png", b"y")]));
    assert_ne!(first, print(&[("b.png", b"x"), ("a.png", b"y")]));
    assert_ne!(first, print(&[("a.png", b"xx"), ("b.png", b"y")]));
    let hash = |bytes: &[u8]| {
        let path = dir.path().join("f");
        std::fs::write(&path, bytes).unwrap();
        mcpipe_data::content_hash(&[path]).unwrap()
    };
    assert_ne!(hash(b"a"), hash(b"b"));
    assert_eq!(hash(b"a"), hash(b"a"));
}

/// Opens whatever the bytes hold and reads all of it; only that nothing panics matters.
fn use_up(bytes: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.tar");
    std::fs::write(&path, bytes).unwrap();
    let scan = scan_tar(&path).unwrap();
    for member in &scan.members {
        assert!(member.offset + member.size <= bytes.len() as u64);
    }
    if let Ok(set) = SampleSet::open(vec![path]) {
        let mut files = ShardFiles::default();
        for i in 0..set.len() {
            let _ = set.read_text(i, &mut files);
            let _ = set.read_class(i, &mut files);
            let _ = set.read_image(i, &mut files);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        use_up(&bytes);
    }

    #[test]
    fn truncations(cut in 0..5000usize) {
        let bytes = two_samples();
        use_up(&bytes[..cut.min(bytes.len())]);
    }

    /// Damage to a header, its checksum made right again so that the damage is not caught there.
    #[test]
    fn damaged_headers(header in 0..4usize, flips in proptest::collection::vec((0..512usize, any::<u8>()), 1..8)) {
        let mut bytes = two_samples();
        let start = header * 1024;
        for (at, value) in flips {
            bytes[start + at] ^= value;
        }
        use_up(&bytes);
        let sum: u32 = bytes[start..start + 512].iter().enumerate()
            .map(|(i, &b)| if (148..156).contains(&i) { 32 } else { u32::from(b) }).sum();
        bytes[start + 148..start + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        use_up(&bytes);
    }

    #[test]
    fn damaged_pax(record in proptest::collection::vec(any::<u8>(), 0..600)) {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::XHeader);
        header.set_size(record.len() as u64);
        header.set_path("PaxHeaders").unwrap();
        header.set_cksum();
        tar.append(&header, &record[..]).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_size(1);
        tar.append_data(&mut header, "a.png", &b"x"[..]).unwrap();
        use_up(&tar.into_inner().unwrap());
    }
}
