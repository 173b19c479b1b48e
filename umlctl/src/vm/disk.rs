//! The COW disk of a VM, and the image that it is on.

use super::Error;
use std::fs::File;
use std::path::Path;

/// Checks that a file can be a VM's image.
///
/// # Errors
/// It cannot; the error says why and what to do.
pub fn check_image(image: &Path) -> Result<(), Error> {
    let bad = |why: &str| Error::Image {
        path: image.to_owned(),
        why: why.to_owned(),
    };
    let meta = std::fs::metadata(image).map_err(|e| {
        bad(&match e.kind() {
            std::io::ErrorKind::NotFound => {
                "it is not there; tools/image-busybox makes one".to_owned()
            }
            _ => e.to_string(),
        })
    })?;
    if !meta.is_file() {
        return Err(bad("it is no regular file"));
    }
    if meta.len() == 0 {
        return Err(bad("it is empty"));
    }
    File::open(image).map_err(|e| bad(&e.to_string()))?;
    Ok(())
}

/// Makes an empty COW disk on an image.
///
/// # Errors
/// The image cannot be used, or the file cannot be made.
pub fn create(path: &Path, image: &Path) -> Result<(), Error> {
    check_image(image)?;
    cowfs::image::create(path, image)
        .map(drop)
        .map_err(|e| Error::Image {
            path: image.to_owned(),
            why: snapshot::resume::text(&e),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_over_another() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("base");
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let cow = dir.path().join("cow");
        create(&cow, &image).unwrap();
        cowfs::image::check(&cow).unwrap();
        assert!(create(&cow, &image).is_err());
    }
}
