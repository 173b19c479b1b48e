//! Errors in words.

use std::error::Error;

/// An error with its reasons, one behind the other.
pub fn in_full(e: &dyn Error) -> String {
    let mut message = e.to_string();
    let mut source = e.source();
    while let Some(s) = source {
        message = format!("{message}: {s}");
        source = s.source();
    }
    message
}
