//! Verbs of `cowfs image`.

use std::path::PathBuf;

use clap::Subcommand;

/// Columns of `image list`.
pub const COLUMNS: [&str; 7] = ["name", "kind", "size", "disk", "written", "base", "state"];

/// Verbs of `image`.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Take a base image into a directory: sparse, read-only, with its digest beside it; prints its path
    Import {
        /// Image
        source: PathBuf,
        /// Directory
        dir: PathBuf,
        /// Name in the directory (that of the source)
        #[arg(long)]
        name: Option<String>,
        /// Replace what has the name already, unless a guest uses it
        #[arg(long)]
        force: bool,
    },
    /// List the images in a directory
    List {
        /// Directory
        dir: PathBuf,
        /// Leave the heading out
        #[arg(long)]
        no_headers: bool,
        /// Columns
        #[arg(short, value_delimiter = ',', value_name = "COL,...", value_parser = COLUMNS)]
        output: Vec<String>,
    },
    /// Make a COW file on a base, as uml_mkcow does
    Create {
        /// COW file to make
        cow: PathBuf,
        /// Base
        base: PathBuf,
        /// Replace what has the name already, unless a guest uses it
        #[arg(long)]
        force: bool,
    },
    /// Make a second COW file with the same contents; inside cowfs nothing is copied. A guest that uses the first must be
    /// frozen meanwhile
    Duplicate {
        /// COW file
        from: PathBuf,
        /// Its duplicate
        to: PathBuf,
        /// Replace what has the name already, unless a guest uses it
        #[arg(long)]
        force: bool,
        /// Return before the duplicate is on disk
        #[arg(long)]
        no_sync: bool,
    },
    /// Show what an image is and whether a guest takes it
    Info {
        /// Base or COW file
        image: PathBuf,
    },
    /// Make a new base of a COW file and its base, as uml_moo does
    Merge {
        /// COW file
        cow: PathBuf,
        /// Base to make
        #[arg(required_unless_present = "in_place")]
        to: Option<PathBuf>,
        /// Replace the COW file's base instead, as uml_moo -d does; no COW file on it is good any more then
        #[arg(long, conflicts_with_all = ["to", "force"])]
        in_place: bool,
        /// Replace what has the name already, unless a guest uses it
        #[arg(long)]
        force: bool,
    },
    /// Put a COW file on another base, so that a guest sees what it saw
    Rebase {
        /// COW file
        cow: PathBuf,
        /// New base
        base: PathBuf,
        /// Change the header only: the new base is known to hold what the old one held
        #[arg(long)]
        unchecked: bool,
    },
    /// Check images: headers, bitmaps, data, bases and their digests
    Verify {
        /// Bases or COW files
        #[arg(required = true)]
        images: Vec<PathBuf>,
    },
    /// Write what a guest sees of an image to a plain file, or to standard output
    Export {
        /// Base or COW file
        image: PathBuf,
        /// File, or - for standard output
        to: PathBuf,
        /// Replace what has the name already, unless a guest uses it
        #[arg(long)]
        force: bool,
    },
}
