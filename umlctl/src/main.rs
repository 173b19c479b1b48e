//! The command `umlctl`.

fn main() -> std::process::ExitCode {
    umlctl::cli::main()
}
