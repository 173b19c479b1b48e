//! The payload of `Exec`: what is to be started.
//!
//! ```text
//!  u8   what: 0 a command, 1 send a file or directory, 2 receive one, 3 power off
//!  u8   flags: 1 on a terminal
//!  u16  rows, u16 columns (with flag 1)
//!  then, each as u16 count and, for every one, u16 length and bytes:
//!       arguments (of 1 and 2: the path)
//!       environment, NAME=VALUE
//! ```

/// What to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// A program, found as a shell would.
    Command,
    /// Sends a file or directory as an archive on standard output.
    Send,
    /// Receives an archive on standard input.
    Receive,
    /// Takes the machine down.
    PowerOff,
}

/// What is to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exec {
    /// What.
    pub what: What,
    /// Rows and columns of the terminal it gets, if it gets one.
    pub terminal: Option<(u16, u16)>,
    /// Arguments, the program first.
    pub arguments: Vec<Vec<u8>>,
    /// More environment.
    pub environment: Vec<Vec<u8>>,
}

impl Exec {
    /// Without a terminal.
    #[must_use]
    pub fn new(what: What, arguments: Vec<Vec<u8>>) -> Self {
        Self {
            what,
            terminal: None,
            arguments,
            environment: Vec::new(),
        }
    }

    /// As bytes; `None` if something is too long.
    #[must_use]
    pub fn encode(&self) -> Option<Vec<u8>> {
        let what = match self.what {
            What::Command => 0,
            What::Send => 1,
            What::Receive => 2,
            What::PowerOff => 3,
        };
        let (rows, columns) = self.terminal.unwrap_or_default();
        let mut to = vec![what, u8::from(self.terminal.is_some())];
        to.extend(rows.to_le_bytes());
        to.extend(columns.to_le_bytes());
        for list in [&self.arguments, &self.environment] {
            to.extend(u16::try_from(list.len()).ok()?.to_le_bytes());
            for item in list {
                to.extend(u16::try_from(item.len()).ok()?.to_le_bytes());
                to.extend(item);
            }
        }
        (to.len() <= crate::wire::MAX_PAYLOAD).then_some(to)
    }

    /// From bytes; `None` if they are none.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes;
        let mut take = |n: usize| {
            let (head, tail) = rest.split_at_checked(n)?;
            rest = tail;
            Some(head)
        };
        let what = match take(1)?[0] {
            0 => What::Command,
            1 => What::Send,
            2 => What::Receive,
            3 => What::PowerOff,
            _ => return None,
        };
        let flags = take(1)?[0];
        let short = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
        let size = (short(take(2)?), short(take(2)?));
        let mut lists = [Vec::new(), Vec::new()];
        for list in &mut lists {
            for _ in 0..short(take(2)?) {
                let length = short(take(2)?);
                list.push(take(length.into())?.to_vec());
            }
        }
        let [arguments, environment] = lists;
        (flags <= 1 && rest.is_empty()).then_some(Self {
            what,
            terminal: (flags == 1).then_some(size),
            arguments,
            environment,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let mut e = Exec::new(What::Command, vec![b"sh".to_vec(), vec![], vec![0xff; 300]]);
        e.environment.push(b"TERM=x".to_vec());
        e.terminal = Some((24, 80));
        let bytes = e.encode().unwrap();
        assert_eq!(Exec::decode(&bytes), Some(e));
        for n in 0..bytes.len() {
            assert_eq!(Exec::decode(&bytes[..n]), None, "cut to {n}");
        }
        let long = Exec::new(What::Command, vec![vec![b'x'; 1 << 17]]);
        assert_eq!(long.encode(), None);
    }
}
