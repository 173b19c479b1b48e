//! `/proc/PID/stat` (proc_pid_stat(5)).

use super::Error;

/// The fields of `stat` that are needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Name, as far as the kernel keeps it.
    pub comm: String,
    /// R, S, D, T, t, Z, X, ...
    pub state: char,
    /// Parent.
    pub ppid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// Controlling terminal's device, 0 for none.
    pub tty: i32,
    /// nice value.
    pub nice: i32,
    /// Start, in clock ticks after boot: with the number it names a process for good.
    pub start_time: u64,
    /// Bytes of address space that are mapped.
    pub vsize: u64,
    /// Signal sent to the parent at the end.
    pub exit_signal: i32,
    /// Processor that it runs on, or ran on last.
    pub processor: i32,
    /// Real-time priority.
    pub rt_priority: i32,
    /// Scheduling policy.
    pub policy: i32,
    /// Exit status as of wait(2).
    pub exit_code: i32,
    /// start_code, end_code, start_data, end_data, start_brk, (brk is not here: 0), start_stack, arg_start, arg_end,
    /// env_start, env_end.
    pub layout: [u64; 11],
}

/// Reads `/proc/PID/stat`.
pub fn stat(pid: i32) -> Result<Stat, Error> {
    let text = super::read(pid, "stat")?;
    parse(&text).ok_or_else(|| Error::Parse(super::path(pid, "stat"), text.clone()))
}

/// Parses the text of `stat`; none if it is not understood.
#[must_use]
pub fn parse(text: &str) -> Option<Stat> {
    let open = text.find('(')?;
    let close = text.rfind(')')?;
    let fields: Vec<&str> = text.get(close + 1..)?.split_ascii_whitespace().collect();
    // Field n of the manual page is at n - 3: pid and comm are cut off.
    let int = |n: usize| fields.get(n - 3)?.parse::<i32>().ok();
    let word = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
    Some(Stat {
        comm: text.get(open + 1..close)?.to_owned(),
        state: fields.first()?.chars().next()?,
        ppid: int(4)?,
        pgid: int(5)?,
        sid: int(6)?,
        tty: int(7)?,
        nice: int(19)?,
        start_time: word(22)?,
        vsize: word(23)?,
        exit_signal: int(38)?,
        processor: int(39)?,
        rt_priority: int(40)?,
        policy: int(41)?,
        exit_code: int(52)?,
        layout: [
            word(26)?,
            word(27)?,
            word(45)?,
            word(46)?,
            word(47)?,
            0,
            word(28)?,
            word(48)?,
            word(49)?,
            word(50)?,
            word(51)?,
        ],
    })
}

/// How long a process or a thread has run and has waited for a processor, nanoseconds, and how often it got one: changes whenever
/// it ran in between.
pub type Ran = [u64; 3];

/// Reads `/proc/PID/schedstat`.
pub fn ran(pid: i32) -> Result<Ran, Error> {
    let bytes = super::read_bytes(pid, "schedstat")?;
    let text = String::from_utf8_lossy(&bytes);
    let mut words = text
        .split_ascii_whitespace()
        .map(|w| w.parse().unwrap_or(0));
    let mut next = || words.next().unwrap_or(0);
    Ok([next(), next(), next()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_and_blanks() {
        let rest: Vec<String> = (4..=52).map(|n| n.to_string()).collect();
        let s = parse(&format!("7 (a) b) S {}", rest.join(" "))).unwrap();
        assert_eq!(
            (s.comm.as_str(), s.state, s.ppid, s.exit_code),
            ("a) b", 'S', 4, 52)
        );
        assert_eq!(s.start_time, 22);
        assert!(parse("7 (a").is_none());
        assert!(stat(std::process::id().cast_signed()).unwrap().start_time > 0);
    }
}
