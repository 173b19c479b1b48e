//! The `cowfs` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    cowfs::cli::main()
}
