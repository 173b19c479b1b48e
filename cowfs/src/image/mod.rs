//! Images of User Mode Linux guests: base images and version-3 COW files, byte for byte as the guest kernel and
//! uml-utilities have them. `docs/images.md` has the format, what is refused, and what a crash leaves.
//!
//! Every verb writes a new file beside its target and renames it when it is whole and on disk; none writes into an image
//! that is there.

mod bitmap;
mod chain;
mod copy;
mod create;
mod digest;
mod duplicate;
mod error;
mod header;
mod import;
mod info;
mod lock;
mod merge;
mod open;
mod publish;
mod rebase;
mod sys;
mod verify;

pub use chain::chain;
pub use create::{create, create_with};
pub use digest::digest_path;
pub use duplicate::{
    Duplicate, DuplicateOptions, duplicate, duplicate_file, duplicate_file_with, duplicate_with,
};
pub use error::ImageError;
pub use header::{HEADER_LEN, Header, Layout, SECTOR, is_cow};
pub use import::{Imported, import};
pub use info::{CowInfo, Info, Kind, info, list};
pub use lock::{Use, in_use};
pub use merge::{Merged, export, export_to, merge, merge_in_place};
pub use open::{Cow, check};
pub use rebase::{Rebased, rebase, rebase_unchecked};
pub use verify::{Report, verify};
