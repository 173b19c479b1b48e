//! Requests, parsed without trust in their lengths.

use super::abi::{self, op};

/// A request.
#[derive(Debug)]
pub struct Request<'a> {
    /// Number that the reply carries.
    pub unique: u64,
    /// Node it is about.
    pub nodeid: u64,
    /// Caller's filesystem user.
    pub uid: u32,
    /// Caller's filesystem group.
    pub gid: u32,
    /// Caller's process.
    pub pid: u32,
    /// What is asked.
    pub op: Op<'a>,
}

/// A time in a SETATTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    /// The present.
    Now,
    /// Seconds and nanoseconds.
    At(i64, u32),
}

/// What to set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "as in stat(2)")]
pub struct Setattr {
    pub size: Option<u64>,
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
    pub ctime: Option<(i64, u32)>,
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// Clear set-id bits with the truncation.
    pub kill_suidgid: bool,
}

impl Setattr {
    /// True if nothing is set: the kernel asks so for set-id bits and capabilities to be cleared before a write by the
    /// caller, or by a chown that changes nothing (FUSE_HANDLE_KILLPRIV_V2).
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What a CREATE or TMPFILE makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "as in open(2)")]
pub struct Create<'a> {
    pub name: &'a [u8],
    pub flags: u32,
    pub mode: u32,
    pub umask: u32,
}

/// The operations.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "named and ordered as in fuse.h")]
pub enum Op<'a> {
    Lookup {
        name: &'a [u8],
    },
    Getattr,
    Setattr(Setattr),
    Readlink,
    Symlink {
        name: &'a [u8],
        target: &'a [u8],
    },
    Mknod {
        name: &'a [u8],
        mode: u32,
        rdev: u32,
        umask: u32,
    },
    Mkdir {
        name: &'a [u8],
        mode: u32,
        umask: u32,
    },
    Unlink {
        name: &'a [u8],
    },
    Rmdir {
        name: &'a [u8],
    },
    Rename {
        name: &'a [u8],
        new_parent: u64,
        new_name: &'a [u8],
        flags: u32,
    },
    Link {
        node: u64,
        new_name: &'a [u8],
    },
    Open {
        flags: u32,
    },
    Read {
        offset: u64,
        size: u32,
    },
    Write {
        offset: u64,
        data: &'a [u8],
        write_flags: u32,
        /// Those of the open file, with O_DSYNC and O_SYNC of the call.
        open_flags: u32,
    },
    Statfs,
    Release,
    Fsync {
        datasync: bool,
    },
    Setxattr {
        name: &'a [u8],
        value: &'a [u8],
        flags: u32,
        extra_flags: u32,
    },
    Getxattr {
        name: &'a [u8],
        size: u32,
    },
    Listxattr {
        size: u32,
    },
    Removexattr {
        name: &'a [u8],
    },
    Flush,
    Opendir,
    Readdir {
        offset: u64,
        size: u32,
    },
    Readdirplus {
        offset: u64,
        size: u32,
    },
    Releasedir,
    Fsyncdir {
        datasync: bool,
    },
    Access {
        mask: u32,
    },
    Create(Create<'a>),
    Fallocate {
        offset: u64,
        length: u64,
        mode: u32,
    },
    Lseek {
        offset: u64,
        whence: u32,
    },
    CopyFileRange {
        offset_in: u64,
        node_out: u64,
        offset_out: u64,
        len: u64,
    },
    Syncfs,
    Tmpfile(Create<'a>),
    Statx,
    Forget {
        nlookup: u64,
    },
    BatchForget {
        pairs: &'a [[u8; 16]],
    },
    Init {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u64,
    },
    Interrupt,
    Destroy,
    Other {
        opcode: u32,
    },
}

/// Reads fields off a body.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.bytes(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.bytes(8)?.try_into().ok()?))
    }

    fn skip(&mut self, n: usize) -> Option<()> {
        self.bytes(n).map(|_| ())
    }

    /// A string up to its final zero.
    fn name(&mut self) -> Option<&'a [u8]> {
        let end = self.0.iter().position(|b| *b == 0)?;
        let (name, rest) = self.0.split_at(end);
        self.0 = &rest[1..];
        Some(name)
    }
}

/// The header's fields, of any request that is long enough.
pub(super) fn header(buf: &[u8]) -> Option<(u32, u64)> {
    let mut f = Fields(buf.get(..abi::IN_HEADER)?);
    f.u32()?;
    Some((f.u32()?, f.u64()?))
}

impl<'a> Request<'a> {
    /// Parses a request as read from the device; `None` if it is cut short.
    pub fn parse(buf: &'a [u8]) -> Option<Self> {
        let len = usize::try_from(Fields(buf).u32()?).ok()?;
        // The message ends where it says: what lies behind it in the buffer is an older one's.
        let mut f = Fields(buf.get(..len)?);
        f.skip(4)?;
        let opcode = f.u32()?;
        let (unique, nodeid) = (f.u64()?, f.u64()?);
        let (uid, gid, pid) = (f.u32()?, f.u32()?, f.u32()?);
        f.skip(4)?;
        Some(Request {
            unique,
            nodeid,
            uid,
            gid,
            pid,
            op: parse_op(opcode, f)?,
        })
    }
}

fn parse_setattr(mut f: Fields<'_>) -> Option<Setattr> {
    let valid = f.u32()?;
    f.skip(12)?;
    let size = f.u64()?;
    f.skip(8)?;
    let times = [f.u64()?, f.u64()?, f.u64()?].map(u64::cast_signed);
    let nsecs = [f.u32()?, f.u32()?, f.u32()?];
    let mode = f.u32()?;
    f.skip(4)?;
    let (uid, gid) = (f.u32()?, f.u32()?);
    let time = |i: usize, set: u32, now: u32| {
        if valid & now != 0 {
            Some(SetTime::Now)
        } else if valid & set != 0 {
            Some(SetTime::At(times[i], nsecs[i].min(999_999_999)))
        } else {
            None
        }
    };
    let has = |bit: u32| valid & bit != 0;
    Some(Setattr {
        size: has(8).then_some(size),
        atime: time(0, 16, 128),
        mtime: time(1, 32, 256),
        ctime: has(1024).then_some((times[2], nsecs[2].min(999_999_999))),
        mode: has(1).then_some(mode),
        uid: has(2).then_some(uid),
        gid: has(4).then_some(gid),
        kill_suidgid: has(2048),
    })
}

fn parse_create<'a>(f: &mut Fields<'a>) -> Option<Create<'a>> {
    let (flags, mode, umask) = (f.u32()?, f.u32()?, f.u32()?);
    f.skip(4)?;
    Some(Create {
        flags,
        mode,
        umask,
        name: f.name()?,
    })
}

#[allow(clippy::too_many_lines, reason = "one arm an operation")]
fn parse_op(opcode: u32, mut f: Fields<'_>) -> Option<Op<'_>> {
    Some(match opcode {
        op::LOOKUP => Op::Lookup { name: f.name()? },
        op::FORGET => Op::Forget { nlookup: f.u64()? },
        op::GETATTR => Op::Getattr,
        op::SETATTR => Op::Setattr(parse_setattr(f)?),
        op::READLINK => Op::Readlink,
        op::SYMLINK => Op::Symlink {
            name: f.name()?,
            target: f.name()?,
        },
        op::MKNOD => {
            let (mode, rdev, umask) = (f.u32()?, f.u32()?, f.u32()?);
            f.skip(4)?;
            Op::Mknod {
                mode,
                rdev,
                umask,
                name: f.name()?,
            }
        }
        op::MKDIR => Op::Mkdir {
            mode: f.u32()?,
            umask: f.u32()?,
            name: f.name()?,
        },
        op::UNLINK => Op::Unlink { name: f.name()? },
        op::RMDIR => Op::Rmdir { name: f.name()? },
        op::RENAME => Op::Rename {
            new_parent: f.u64()?,
            flags: 0,
            name: f.name()?,
            new_name: f.name()?,
        },
        op::RENAME2 => {
            let (new_parent, flags) = (f.u64()?, f.u32()?);
            f.skip(4)?;
            Op::Rename {
                new_parent,
                flags,
                name: f.name()?,
                new_name: f.name()?,
            }
        }
        op::LINK => Op::Link {
            node: f.u64()?,
            new_name: f.name()?,
        },
        op::OPEN => Op::Open { flags: f.u32()? },
        op::READ | op::READDIR | op::READDIRPLUS => {
            f.skip(8)?;
            let (offset, size) = (f.u64()?, f.u32()?);
            match opcode {
                op::READ => Op::Read { offset, size },
                op::READDIR => Op::Readdir { offset, size },
                _ => Op::Readdirplus { offset, size },
            }
        }
        op::WRITE => {
            f.skip(8)?;
            let (offset, size, write_flags) = (f.u64()?, f.u32()?, f.u32()?);
            f.skip(8)?;
            let open_flags = f.u32()?;
            f.skip(4)?;
            Op::Write {
                offset,
                write_flags,
                open_flags,
                data: f.bytes(usize::try_from(size).ok()?)?,
            }
        }
        op::STATFS => Op::Statfs,
        op::RELEASE => Op::Release,
        op::FSYNC | op::FSYNCDIR => {
            f.skip(8)?;
            let datasync = f.u32()? & 1 != 0;
            match opcode {
                op::FSYNC => Op::Fsync { datasync },
                _ => Op::Fsyncdir { datasync },
            }
        }
        op::SETXATTR => {
            let (size, flags, extra_flags) = (f.u32()?, f.u32()?, f.u32()?);
            f.skip(4)?;
            Op::Setxattr {
                flags,
                extra_flags,
                name: f.name()?,
                value: f.bytes(usize::try_from(size).ok()?)?,
            }
        }
        op::GETXATTR => {
            let size = f.u32()?;
            f.skip(4)?;
            Op::Getxattr {
                size,
                name: f.name()?,
            }
        }
        op::LISTXATTR => Op::Listxattr { size: f.u32()? },
        op::REMOVEXATTR => Op::Removexattr { name: f.name()? },
        op::FLUSH => Op::Flush,
        op::INIT => {
            let (major, minor, max_readahead, flags) = (f.u32()?, f.u32()?, f.u32()?, f.u32()?);
            let flags2 = f.u32().unwrap_or(0);
            Op::Init {
                major,
                minor,
                max_readahead,
                flags: u64::from(flags) | u64::from(flags2) << 32,
            }
        }
        op::OPENDIR => Op::Opendir,
        op::RELEASEDIR => Op::Releasedir,
        op::ACCESS => Op::Access { mask: f.u32()? },
        op::CREATE => Op::Create(parse_create(&mut f)?),
        op::TMPFILE => Op::Tmpfile(parse_create(&mut f)?),
        op::INTERRUPT => Op::Interrupt,
        op::DESTROY => Op::Destroy,
        op::BATCH_FORGET => {
            let count = usize::try_from(f.u32()?).ok()?;
            f.skip(4)?;
            let (pairs, _) = f.0.as_chunks::<16>();
            Op::BatchForget {
                pairs: pairs.get(..count)?,
            }
        }
        op::FALLOCATE => {
            f.skip(8)?;
            Op::Fallocate {
                offset: f.u64()?,
                length: f.u64()?,
                mode: f.u32()?,
            }
        }
        op::LSEEK => {
            f.skip(8)?;
            Op::Lseek {
                offset: f.u64()?,
                whence: f.u32()?,
            }
        }
        op::COPY_FILE_RANGE => {
            f.skip(8)?;
            let (offset_in, node_out) = (f.u64()?, f.u64()?);
            f.skip(8)?;
            Op::CopyFileRange {
                offset_in,
                node_out,
                offset_out: f.u64()?,
                len: f.u64()?,
            }
        }
        op::SYNCFS => Op::Syncfs,
        op::STATX => Op::Statx,
        other => Op::Other { opcode: other },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(opcode: u32, body: &[u8]) -> Vec<u8> {
        let mut m = Vec::new();
        m.extend_from_slice(&u32::try_from(40 + body.len()).unwrap_or(0).to_le_bytes());
        m.extend_from_slice(&opcode.to_le_bytes());
        m.extend_from_slice(&7u64.to_le_bytes());
        m.extend_from_slice(&9u64.to_le_bytes());
        m.extend_from_slice(&[0; 16]);
        m.extend_from_slice(body);
        m
    }

    #[test]
    fn parses() {
        let rename: Vec<u8> = [&5u64.to_le_bytes()[..], b"a\0bc\0"].concat();
        let mut write = vec![0; 40];
        write[8] = 3;
        write[16] = 2;
        write.extend_from_slice(b"xy");
        let cases: Vec<(u32, Vec<u8>, Op<'_>)> = vec![
            (op::LOOKUP, b"name\0".to_vec(), Op::Lookup { name: b"name" }),
            (
                op::RENAME,
                rename,
                Op::Rename {
                    name: b"a",
                    new_parent: 5,
                    new_name: b"bc",
                    flags: 0,
                },
            ),
            (
                op::WRITE,
                write,
                Op::Write {
                    offset: 3,
                    data: b"xy",
                    write_flags: 0,
                    open_flags: 0,
                },
            ),
            (99, vec![], Op::Other { opcode: 99 }),
        ];
        for (opcode, body, want) in &cases {
            let m = message(*opcode, body);
            let got = Request::parse(&m).map(|r| r.op);
            assert_eq!(got.as_ref(), Some(want));
        }
    }

    #[test]
    fn refuses_what_is_cut_short() {
        for opcode in 0..60 {
            for len in 0..100 {
                let m = message(opcode, &vec![1; len]);
                // No panic, whatever it is.
                let _ = Request::parse(&m);
                let _ = Request::parse(&m[..len.min(m.len())]);
            }
        }
        assert!(Request::parse(&message(op::LOOKUP, b"no end")).is_none());
        assert!(
            Request::parse(&message(op::CREATE, &[&[0; 16][..], b"no end"].concat())).is_none()
        );
        let older = [message(op::LOOKUP, b"no end"), b"\0".to_vec()].concat();
        assert!(Request::parse(&older).is_none());
        assert!(Request::parse(&message(op::WRITE, &[255; 40])).is_none());
    }
}
