//! Captures a User Mode Linux machine, for experiments: `umltake MAIN-PID DIR [EXTERNAL-FD...]`.

use snapshot::uml::capture::{Request, capture};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let main = args[1].parse().unwrap();
    let dir = std::path::PathBuf::from(&args[2]);
    let externals: Vec<i32> = args[3..].iter().map(|a| a.parse().unwrap()).collect();
    let mut learned = None;
    let kill = std::env::var_os("KILL").is_some();
    let mut kill_it = || {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(main), nix::sys::signal::SIGKILL);
    };
    let modes: &[bool] = if kill {
        &[false]
    } else {
        &[false, false, false, true]
    };
    for &copy in modes {
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        let mut request = Request {
            main,
            dir: &dir,
            externals: &externals,
            learned: &mut learned,
            stop_and_copy: copy,
            kill: if kill { Some(&mut kill_it) } else { None },
            disk: None,
            inspect: None,
        };
        match capture(&mut request) {
            Ok((m, s)) => {
                snapshot::uml::manifest::write(&dir, &m).unwrap();
                println!(
                    "{s:#?} private {:?} users {}",
                    m.private.len(),
                    m.users.len()
                );
            }
            Err(e) => {
                println!("{e:?}");
                std::process::exit(1);
            }
        }
    }
    println!("{learned:#?}");
}
