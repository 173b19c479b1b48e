//! Manifests that someone has tampered with.
pub(crate) const TESTS: &[(&str, fn())] = &[];
