//! The verbs for VMs.

pub mod args;
pub mod console;
pub mod cp;
pub mod end;
pub mod exec;
pub mod list;
pub mod logs;
mod raw;
pub mod run;
pub mod snapshot;

use crate::control::Request;
use crate::control::client::Client;
use crate::vm::Error;
use crate::vm::home::{Home, Vm};
use crate::vm::state::State;
use anyhow::Result;

/// The VM of this name.
pub fn find(name: &str) -> Result<Vm> {
    Ok(Home::from_env()?.find(&name.parse()?)?)
}

/// A connection to a VM that runs.
pub fn connect(vm: &Vm) -> Result<Client> {
    match Client::connect(vm) {
        Ok(client) => Ok(client),
        Err(crate::control::Error::Gone) => {
            let phase = vm.state()?.phase;
            Err(Error::NotRunning(vm.name().to_string(), phase.word()).into())
        }
        Err(e) => Err(e.into()),
    }
}

/// A request that is answered by a state. If the supervisor goes away meanwhile, the state it has left behind.
pub fn ask_until_end(vm: &Vm, request: &Request) -> Result<State> {
    match connect(vm)?.ask_state(request) {
        Err(crate::control::Error::Gone) => Ok(vm.state()?),
        other => Ok(other?),
    }
}
