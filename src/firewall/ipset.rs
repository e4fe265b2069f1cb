//! The sets that hold the addresses of many rules in the kernel, and `ipset`,
//! which reads and writes them.
//!
//! ```text
//! name  = "rfw" ( "4" / "6" ) state target ":" where        ; 31 bytes at most
//! state = ":"         ; in use
//!       / "?"         ; a list that is being written
//!       / "+" / "-"   ; a whole list, on its way into or out of the set in use
//! where = "in:" iface / "out:" iface / "fwd:" iface ":" iface ":" ( "src" / "dst" )
//!       / "fwd:~" 14HEXDIG                 ; names too long: a hash of them
//! ```

use super::exec::{self, Failure, Feed, Presence};
use super::kernel::{LIMIT, START_LIMIT, limit_of};
use super::{Tally, Verdict};
use crate::rule::net::{Family, Net};
use crate::rule::{Chain, End, Place};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Where ipset is, if rfw.conf does not say so.
pub const DEFAULT_PATH: &str = "/sbin/ipset";

const FULL: &str = "The set has no room for so many; raise ipset.maxelem in rfw.conf.";
/// The longest name (ip_set.h: IPSET_MAXNAMELEN less the NUL).
const MAX_NAME: usize = 31;
/// The name of the set for a place.
pub fn set_name(place: &Place, family: Family) -> String {
    let digit = if family == Family::V4 { 4 } else { 6 };
    let target = place.target.name().to_ascii_lowercase();
    let Place { inp, out, .. } = place;
    let end = if place.end == End::Source { "src" } else { "dst" };
    let (chain, ifaces) = match place.chain {
        Chain::Input => ("in", inp.to_string()),
        Chain::Output => ("out", out.to_string()),
        Chain::Forward => ("fwd", format!("{inp}:{out}:{end}")),
    };
    let name = format!("rfw{digit}:{target}:{chain}:{ifaces}");
    match name.len() > MAX_NAME {
        true => format!("rfw{digit}:{target}:{chain}:~{:014x}", hash(&ifaces)),
        false => name,
    }
}

/// FNV-1a, 56 bits of it.
fn hash(text: &str) -> u64 {
    let step = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, step) >> 8
}

/// The name of a list on its way to a set in use.
fn staged(name: &str, state: &str) -> String {
    name.replacen(':', state, 1)
}

/// The state in a name of rfw's, and what else it says: family, target and place.
fn parse_name(name: &str) -> Option<(&str, (&str, &str, &str))> {
    let (family, rest) = name.split_at_checked(4)?;
    let (state, rest) = rest.split_at_checked(1)?;
    let (target, place) = rest.split_once(':')?;
    let known =
        ["accept", "drop", "reject"].contains(&target) && [":", "?", "+", "-"].contains(&state);
    (known && ["rfw4", "rfw6"].contains(&family)).then_some((state, (family, target, place)))
}

/// The set in use that a list is on its way to, and its state.
fn destination(name: &str) -> Option<(String, &str)> {
    let (state, (family, target, place)) = parse_name(name).filter(|(state, _)| *state != ":")?;
    Some((format!("{family}:{target}:{place}"), state))
}

/// Whether both are sets in use of one place, with different targets.
fn are_rivals(a: &str, b: &str) -> bool {
    match (parse_name(a), parse_name(b)) {
        (Some((":", a)), Some((":", b))) => (a.0, a.2) == (b.0, b.2) && a.1 != b.1,
        _ => false,
    }
}

/// What is known of a set without reading it.
pub struct Header {
    pub name: String,
    pub maxelem: usize,
    pub entries: usize,
}

/// An address in a set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    pub net: Net,
    /// Seconds that are left; 0 is for ever.
    pub timeout: u32,
    /// Packets and bytes that it has met.
    pub counters: (u64, u64),
}

/// Blocks that are to be in one set, or not.
pub struct Load<'a> {
    pub name: String,
    pub family: Family,
    /// Sorted, none twice.
    pub nets: &'a [Net],
    /// For how many seconds, 0 is for ever; `None` takes them out.
    pub put: Option<u32>,
}

/// A load, and how it meets what is there.
struct Plan<'a> {
    load: &'a Load<'a>,
    /// One for each block.
    verdicts: Vec<Verdict>,
    /// What is to leave the sets of other targets.
    elsewhere: Vec<(String, Net)>,
    /// How many entries there are before.
    before: usize,
}

/// The program.
#[derive(Clone)]
pub struct Ipset {
    program: PathBuf,
    /// The most entries of a set.
    pub maxelem: usize,
    presence: Arc<Presence>,
}

impl Ipset {
    /// `program` is an absolute path.
    pub fn new(program: PathBuf, maxelem: usize, presence: Arc<Presence>) -> Ipset {
        Ipset { program, maxelem, presence }
    }

    /// The sets of rfw's that are in use.
    pub fn headers(&self) -> Result<Vec<Header>, Failure> {
        let mut headers: Vec<Header> = Vec::new();
        exec::lines(&self.program, &["list", "-terse"], LIMIT, |line| {
            let (key, value) = line.trim_end().split_once(": ").unwrap_or_default();
            match (key, headers.last_mut()) {
                // Where the kernel does not count, a set is never taken for empty.
                ("Name", _) => {
                    headers.push(Header { name: value.into(), maxelem: 0, entries: usize::MAX });
                }
                ("Header", Some(header)) => {
                    let mut words = value.split(' ').skip_while(|word| *word != "maxelem").skip(1);
                    header.maxelem = words.next().and_then(|n| n.parse().ok()).unwrap_or(0);
                }
                ("Number of entries", Some(header)) => {
                    header.entries = value.parse().unwrap_or(usize::MAX);
                }
                _ => {}
            }
            true
        })?;
        headers.retain(|header| matches!(parse_name(&header.name), Some((":", _))));
        Ok(headers)
    }

    /// Reads a set until `each` says `false`; one that is not there is empty.
    pub fn entries(
        &self,
        name: &str,
        limit: Duration,
        mut each: impl FnMut(Entry) -> bool,
    ) -> Result<(), Failure> {
        let each = |line: &str| parse_entry(line).is_none_or(&mut each);
        match exec::lines(&self.program, &["save", name], limit, each) {
            Err(Failure::Refused(words)) if words.contains("does not exist") => Ok(()),
            result => result,
        }
    }

    pub fn create(&self, name: &str, family: Family) -> Result<(), Failure> {
        self.restore(1, |input| self.write_create(input, name, family, 0))
    }

    pub fn destroy(&self, name: &str) -> Result<(), Failure> {
        self.run(&["destroy", name])
    }

    /// Has an address in a set, and in none of its rivals.
    pub fn put(&self, name: &str, net: Net, seconds: u32) -> Result<Verdict, Failure> {
        let (net, seconds) = (net.to_string(), seconds.to_string());
        let entry = [name, &net, "timeout", &seconds];
        match self.run(&[&["add"], &entry[..]].concat()) {
            Err(Failure::Refused(words)) if words.contains("already added") => {
                self.run(&[&["-exist", "add"], &entry[..]].concat())?;
                Ok(Verdict::Refreshed)
            }
            result => result.map(|()| Verdict::Inserted),
        }
    }

    pub fn delete(&self, name: &str, net: Net) -> Result<Verdict, Failure> {
        match self.run(&["del", name, &net.to_string()]) {
            Err(Failure::Refused(words)) if words.contains("not added") => Ok(Verdict::Absent),
            result => result.map(|()| Verdict::Deleted),
        }
    }

    /// Carries out loads, all of them or none: ipset knows no transactions, so
    /// each is first written to a set of its own. When all are there, they are
    /// renamed, which says so; whoever finds them then, carries them out. Into
    /// an empty set the whole list goes at once.
    pub fn carry_out(&self, loads: &[Load<'_>]) -> Result<Vec<Tally>, Failure> {
        let names = self.names()?;
        let plan = |load| self.plan(load, &names);
        let plans = loads.iter().map(plan).collect::<Result<Vec<_>, _>>()?;
        let count = loads.iter().map(|load| load.nets.len()).sum::<usize>().saturating_mul(2);
        let written = self.restore(count, |input| {
            plans.iter().try_for_each(|plan| self.write_stage(input, plan))?;
            // So that it gets what renames them in one piece.
            input.flush()?;
            plans.iter().try_for_each(|plan| plan.write_commit(input))?;
            plans.iter().try_for_each(|plan| plan.write_changes(input))
        });
        // What was whole by then is carried out after all.
        if let Err(failure) = written {
            self.settle()?.then_some(()).ok_or(failure)?;
        }
        Ok(plans.iter().map(Plan::tally).collect())
    }

    /// Ends what was begun with a list: where all of its sets are whole they are
    /// carried out, else dropped. Says whether they were whole. One that the kernel
    /// refuses is dropped too.
    pub fn settle(&self) -> Result<bool, Failure> {
        let names = self.names()?;
        let lists = names.iter().filter_map(|list| Some((list, destination(list)?)));
        let mut lists: Vec<_> = lists.map(|(list, (name, state))| (list, name, state)).collect();
        // One that is not whole goes last: for as long as it is there it says so.
        lists.sort_by_key(|(_, _, state)| *state == "?");
        let whole = lists.last().is_some_and(|(_, _, state)| *state != "?");
        let mut refused = Ok(());
        for (list, name, state) in lists {
            // The set in use has gone: nobody was answered for its addresses.
            if whole && names.contains(&name) {
                match self.replay(list, &name, state == "+", &names) {
                    Err(failure) if !failure.is_passing() => refused = Err(failure),
                    result => result?,
                }
            }
            self.destroy(list)?;
        }
        refused.map(|()| whole)
    }

    fn replay(&self, list: &str, name: &str, put: bool, names: &[String]) -> Result<(), Failure> {
        let mut entries = Vec::new();
        self.entries(list, START_LIMIT, |entry| {
            entries.push(entry);
            true
        })?;
        let rivals: Vec<_> = names.iter().filter(|n| put && are_rivals(n, name)).collect();
        self.restore(entries.len(), |input| {
            for Entry { net, timeout, .. } in entries {
                match put {
                    true => input.line(format_args!("add {name} {net} timeout {timeout}"))?,
                    false => input.line(format_args!("del {name} {net}"))?,
                }
                rivals.iter().try_for_each(|r| input.line(format_args!("del {r} {net}")))?;
            }
            Ok(())
        })
    }

    /// Sees to it that a set has room for as many entries as rfw.conf says.
    pub fn fit(&self, header: &Header, family: Family) -> Result<(), Failure> {
        match header.maxelem != self.maxelem && header.entries <= self.maxelem {
            true => self.resize(&header.name, family, header.entries),
            false => Ok(()),
        }
    }

    fn resize(&self, name: &str, family: Family, entries: usize) -> Result<(), Failure> {
        let stage = staged(name, "?");
        let mut read = Ok(());
        let written = self.restore(entries, |input| {
            self.write_create(input, &stage, family, entries)?;
            let mut written = Ok(());
            read = self.entries(
                name,
                START_LIMIT,
                |Entry { net, timeout, counters: (packets, bytes) }| {
                    let counters = format!("packets {packets} bytes {bytes}");
                    written =
                        input.line(format_args!("add {stage} {net} timeout {timeout} {counters}"));
                    written.is_ok()
                },
            );
            if read.is_ok() {
                input.line(format_args!("swap {stage} {name}\ndestroy {stage}"))?;
            }
            written
        });
        read.and(written)
    }

    /// How a load meets what is there.
    fn plan<'a>(&self, load: &'a Load<'a>, names: &[String]) -> Result<Plan<'a>, Failure> {
        let (absent, present) = match load.put {
            Some(_) => (Verdict::Inserted, Verdict::Refreshed),
            None => (Verdict::Absent, Verdict::Deleted),
        };
        let limit = limit_of(load.nets.len());
        let mut verdicts = vec![absent; load.nets.len()];
        let mut before = 0_usize;
        self.entries(&load.name, limit, |entry| {
            before = before.saturating_add(1);
            let at = load.nets.binary_search(&entry.net).ok();
            if let Some(verdict) = at.and_then(|at| verdicts.get_mut(at)) {
                let same = load.put == Some(0) && entry.timeout == 0;
                *verdict = if same { Verdict::Exists } else { present };
            }
            true
        })?;
        let inserted = verdicts.iter().filter(|verdict| **verdict == Verdict::Inserted).count();
        if inserted > 0 && before.saturating_add(inserted) > self.maxelem {
            return Err(Failure::Full(FULL));
        }
        let mut elsewhere = Vec::new();
        let rivals = names.iter().filter(|name| load.put.is_some() && are_rivals(name, &load.name));
        for rival in rivals {
            self.entries(rival, limit, |entry| {
                let found = load.nets.binary_search(&entry.net).is_ok();
                elsewhere.extend(found.then(|| (rival.clone(), entry.net)));
                true
            })?;
        }
        Ok(Plan { load, verdicts, elsewhere, before })
    }

    fn write_stage(&self, input: &mut Feed<'_>, plan: &Plan<'_>) -> io::Result<()> {
        let Load { name, family, nets, put, .. } = plan.load;
        let stage = staged(name, "?");
        self.write_create(input, &stage, *family, nets.len())?;
        plan.changed().try_for_each(|net| match put {
            Some(timeout) => input.line(format_args!("add {stage} {net} timeout {timeout}")),
            None => input.line(format_args!("add {stage} {net}")),
        })
    }

    pub fn write_create(
        &self,
        input: &mut Feed<'_>,
        name: &str,
        family: Family,
        entries: usize,
    ) -> io::Result<()> {
        let family = if family == Family::V4 { "inet" } else { "inet6" };
        let maxelem = self.maxelem.max(entries);
        // As large as the kernel makes it by and by.
        let hashsize = (entries / 4).next_power_of_two().max(1024);
        let sizes = format!("hashsize {hashsize} maxelem {maxelem}");
        input
            .line(format_args!("create {name} hash:net family {family} {sizes} timeout 0 counters"))
    }

    fn names(&self) -> Result<Vec<String>, Failure> {
        let mut names = Vec::new();
        exec::lines(&self.program, &["list", "-name"], LIMIT, |line| {
            names.push(line.trim_end().to_string());
            true
        })?;
        Ok(names)
    }

    fn run(&self, args: &[&str]) -> Result<(), Failure> {
        full(exec::run(&self.presence, &self.program, args, LIMIT, |_| Ok(())))
    }

    /// Commits lines in order. What is there or is not there already is no failure.
    pub fn restore(
        &self,
        lines: usize,
        write: impl FnOnce(&mut Feed<'_>) -> io::Result<()>,
    ) -> Result<(), Failure> {
        let args = ["-exist", "restore"];
        full(exec::run(&self.presence, &self.program, &args, limit_of(lines), write))
    }
}

impl Plan<'_> {
    /// The blocks about which something is to be done.
    fn changed(&self) -> impl Iterator<Item = &Net> {
        let idle = [Verdict::Exists, Verdict::Absent];
        let nets = self.load.nets.iter().zip(&self.verdicts);
        nets.filter(move |(_, verdict)| !idle.contains(verdict)).map(|(net, _)| net)
    }

    fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        self.verdicts.iter().for_each(|verdict| tally.add(*verdict, 1));
        tally
    }

    /// The list's name when it is whole.
    fn whole(&self) -> String {
        staged(&self.load.name, if self.load.put.is_some() { "+" } else { "-" })
    }

    fn write_commit(&self, input: &mut Feed<'_>) -> io::Result<()> {
        input.line(format_args!("rename {} {}", staged(&self.load.name, "?"), self.whole()))
    }

    fn write_changes(&self, input: &mut Feed<'_>) -> io::Result<()> {
        let (name, whole) = (&self.load.name, self.whole());
        // An empty set can be the list at once, unless something is to go meanwhile.
        if self.before == 0 && self.load.put.is_some() && self.elsewhere.is_empty() {
            return input.line(format_args!("swap {whole} {name}\ndestroy {whole}"));
        }
        self.changed().try_for_each(|net| match self.load.put {
            Some(timeout) => input.line(format_args!("add {name} {net} timeout {timeout}")),
            None => input.line(format_args!("del {name} {net}")),
        })?;
        self.elsewhere.iter().try_for_each(|(r, net)| input.line(format_args!("del {r} {net}")))?;
        input.line(format_args!("destroy {whole}"))
    }
}

fn full(result: Result<(), Failure>) -> Result<(), Failure> {
    match result {
        Err(Failure::Refused(words)) if words.contains("is full") => Err(Failure::Full(FULL)),
        result => result,
    }
}

/// Reads a line of `ipset save`: `add NAME NET [timeout N] [packets N bytes N]`.
pub fn parse_entry(line: &str) -> Option<Entry> {
    let mut words = line.trim_end().strip_prefix("add ")?.split(' ').skip(1);
    let mut entry = Entry { net: Net::parse(words.next()?)?, timeout: 0, counters: (0, 0) };
    while let Some(word) = words.next() {
        match word {
            "timeout" => entry.timeout = words.next()?.parse().ok()?,
            "packets" => entry.counters.0 = words.next()?.parse().ok()?,
            "bytes" => entry.counters.1 = words.next()?.parse().ok()?,
            _ => {}
        }
    }
    Some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::Iface;

    #[test]
    fn names() {
        let long = "a-long-name-123";
        let table = [
            ("drop", "input", "any", "any", "rfw4:drop:in:any"),
            ("reject", "output", "any", long, "rfw4:reject:out:a-long-name-123"),
            ("reject", "input", "br-lan", "any", "rfw4:reject:in:br-lan+"),
            ("accept", "forward", "eth0", "any", "rfw4:accept:fwd:eth0:any:src"),
            ("accept", "forward", "eth0", "ppp+", "rfw4:accept:fwd:eth0:ppp+:src"),
            ("reject", "forward", long, "any", "rfw4:reject:fwd:~68e9884a65c005"),
            ("drop", "forward", long, long, "rfw4:drop:fwd:~a5626d73481bc9"),
        ];
        for (target, chain, inp, out, name) in table {
            let iface = if inp == "any" { out } else { inp };
            let mut place = Place::parse(&[target, chain, iface]).unwrap();
            if chain == "forward" {
                place.out = Iface::parse(out).unwrap();
            }
            assert_eq!(set_name(&place, Family::V4), name);
            assert!(name.len() <= MAX_NAME && parse_name(name).is_some(), "{name}");
        }
    }

    #[test]
    fn names_of_lists_and_of_rivals() {
        assert_eq!(staged("rfw4:drop:in:any", "?"), "rfw4?drop:in:any");
        assert_eq!(destination("rfw4?drop:in:any"), Some(("rfw4:drop:in:any".into(), "?")));
        assert_eq!(destination("rfw6-drop:in:any"), Some(("rfw6:drop:in:any".into(), "-")));
        for name in ["rfw4:drop:in:any", "rfw5+drop:x", "abc4+drop:x", "rfw4-list", "r", "rfwé+"] {
            assert_eq!(destination(name), None, "{name}");
        }
        assert!(are_rivals("rfw4:drop:in:any", "rfw4:accept:in:any"));
        assert!(are_rivals("rfw4:drop:fwd:~12", "rfw4:reject:fwd:~12"));
        for name in ["rfw4:drop:in:any", "rfw6:accept:in:any", "rfw4:accept:out:any", "rfw4+x", ""]
        {
            assert!(!are_rivals("rfw4:drop:in:any", name), "{name}");
        }
        assert!(!are_rivals("", "mine"));
    }

    #[test]
    fn entries() {
        let table = [
            ("add s 1.2.3.4\n", "1.2.3.4 0 (0, 0)"),
            ("add s 1.2.3.0/24 timeout 90 packets 5 bytes 7\n", "1.2.3.0/24 90 (5, 7)"),
            ("add s 2001:db8::/64 timeout 0 nomatch\n", "2001:db8::/64 0 (0, 0)"),
            ("create s hash:net family inet timeout 0", "none"),
            ("add s example.com", "none"),
        ];
        for (line, entry) in table {
            let read = parse_entry(line)
                .map_or("none".into(), |Entry { net, timeout, counters }| {
                    format!("{net} {timeout} {counters:?}")
                });
            assert_eq!(read, entry, "{line}");
        }
    }
}
