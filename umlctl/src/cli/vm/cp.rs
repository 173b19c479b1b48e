//! `umlctl cp`.

use super::args::Cp;
use super::{connect, find};
use crate::agent::Session;
use crate::agent::copy;
use crate::cli::code;
use crate::vm::name::Name;
use anyhow::{Context, Result};
use std::path::Path;
use umlctl_agent::exec::{Exec, What};

/// One side.
enum Place<'a> {
    Here(&'a Path),
    There(&'a str, &'a str),
}

/// NAME:PATH is in a VM. A path with a slash before its first colon is here, so ./a:b is.
fn place(text: &str) -> Place<'_> {
    match text.split_once(':') {
        Some((name, path)) if name.parse::<Name>().is_ok() && !path.is_empty() => {
            Place::There(name, path)
        }
        _ => Place::Here(Path::new(text)),
    }
}

/// Copies.
pub fn run(a: &Cp, json: bool) -> Result<u8> {
    let begin = |name: &str, what, path: &str| -> Result<Session> {
        let wanted = Exec::new(what, vec![path.as_bytes().to_vec()]);
        Ok(Session::begin(connect(&find(name)?)?, &wanted)?)
    };
    let complete = match (place(&a.from), place(&a.to)) {
        (Place::Here(from), Place::There(name, path)) => {
            // Before the guest is asked for anything.
            std::fs::metadata(from).with_context(|| format!("cannot read {}", from.display()))?;
            copy::push(&mut begin(name, What::Receive, path)?, from)?
        }
        (Place::There(name, path), Place::Here(to)) => {
            copy::fetch(&mut begin(name, What::Send, path)?, to)?.1
        }
        (Place::Here(_), Place::Here(_)) => {
            anyhow::bail!("neither is in a VM: write one of them as NAME:PATH");
        }
        (Place::There(..), Place::There(..)) => {
            anyhow::bail!("both are in a VM: copy by way of a file here");
        }
    };
    if json {
        println!("{}", serde_json::json!({ "complete": complete }));
    }
    Ok(if complete { 0 } else { code::PARTIAL })
}
