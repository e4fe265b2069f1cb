//! What the command function does with sets: one for each place and family that
//! has addresses, and one rule for each set, which stands before all others.
//!
//! The entries are the kernel's alone, and so is their expiry. A set and its rule
//! are made before its first entry; both go when the last one has gone.

use super::exec::Failure;
use super::ipset::{DEFAULT_PATH, Entry, Header, Ipset, Load};
use super::kernel::{Line, Owned, START_LIMIT};
use super::mirror::{Batch, REAL_TIME};
use super::{Kernel, Outcome, Table, Tally, Verdict, cut, only_passing};
use crate::log::Log;
use crate::rule::interval::LONGEST_IN_SET;
use crate::rule::net::Net;
use crate::rule::{Action, Chain, Change, End, Iface, Place, Rule, Rules, Target};
use crate::state::{Kept, State};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::slice;
use std::time::Duration;

impl Entry {
    /// As the rule that it stands for. Of the time that is left the kernel tells
    /// whole seconds, so it is up to one more.
    pub fn owned(&self, place: Place, now: Duration) -> Owned {
        let left = Some(u64::from(self.timeout)).filter(|left| *left > 0);
        let expires = left.map(|left| super::ceiling(now).saturating_add(left).saturating_add(1));
        Owned { line: Line::plain(place.rule(self.net)), expires, counters: self.counters }
    }
}

/// A change of rules that sets stand for.
struct Order<'a> {
    place: Place,
    nets: &'a [Net],
    /// For how many seconds, 0 is for ever; `None` takes them out.
    put: Option<u32>,
    /// Unix seconds.
    expires: Option<u64>,
    is_list: bool,
}

impl Kernel {
    /// Carries out a change of rules that sets stand for.
    pub fn commit_to_sets(
        &mut self,
        ipset: &Ipset,
        change: &Change,
        now: Duration,
    ) -> Result<Outcome, Failure> {
        if self.unsettled {
            self.settle(ipset)?;
        }
        let (place, single, nets) = match &change.rules {
            Rules::List(place, nets) => (*place, None, nets.as_slice()),
            Rules::One(rule) => match rule.place() {
                Some((place, net)) => (place, Some(net), &[][..]),
                None => {
                    let mut results = self.commit_rules(slice::from_ref(change), now);
                    return results.pop().unwrap_or(Ok(Outcome::default()));
                }
            },
        };
        let nets = single.as_ref().map_or(nets, slice::from_ref);
        let (put, expires) = match change.action {
            Action::Delete => (None, None),
            Action::Put(0) => (Some(0), None),
            Action::Put(seconds) => {
                // The API takes no longer ones.
                let timeout = u32::try_from(seconds).unwrap_or(LONGEST_IN_SET);
                (Some(timeout), Some(super::ceiling(now).saturating_add(seconds)))
            }
        };
        let order = Order { place, nets, put, expires, is_list: single.is_none() };
        let mark = self.state.as_ref().map(State::mark);
        self.write_state(&order)?;
        let result = self.carry_out(ipset, &order, now);
        match &result {
            // A list that was cut short may be whole all the same.
            Err(failure) if failure.is_passing() && self.unsettled => self.doubtful = mark,
            Err(_) => cut(&mut self.state, mark),
            Ok(_) => {}
        }
        result
    }

    /// Puts into the state file what is to happen to addresses: a PUT takes them out of
    /// the sets of the other targets.
    fn write_state(&mut self, order: &Order<'_>) -> Result<(), Failure> {
        let Some(state) = &mut self.state else { return Ok(()) };
        let wanted = order.put.map(|_| order.expires);
        let is_there = |place: Place, net: &Net| {
            let line = Line::set(place, net.family());
            self.tables.iter().any(|table| table.mirror.has(&line))
        };
        let others: Vec<Place> = order.place.others().filter(|_| wanted.is_some()).collect();
        let changes = order.nets.iter().flat_map(|net| {
            let rivals = others.iter().filter(|other| is_there(**other, net));
            let rivals = rivals.map(|other| (other.rule(*net), None));
            let mine = wanted.is_some() || is_there(order.place, net);
            rivals.chain(mine.then(|| (order.place.rule(*net), wanted)))
        });
        let count = changes.clone().count();
        state.append(changes, order.is_list.then_some(count)).map_err(Failure::State)
    }

    fn carry_out(
        &mut self,
        ipset: &Ipset,
        order: &Order<'_>,
        now: Duration,
    ) -> Result<Outcome, Failure> {
        let Order { place, nets, put, expires, is_list } = *order;
        let mut outcome = Outcome { tally: Tally::default(), expires };
        let mut loads = Vec::new();
        for nets in nets.chunk_by(|a, b| a.family() == b.family()) {
            let load = self.load(ipset, place, nets, put, now)?;
            match load {
                Some(load) => loads.push(load),
                None => outcome.tally.add(Verdict::Absent, nets.len()),
            }
        }
        let tallies = match nets {
            [net] if !is_list => loads.iter().map(|l| self.one(ipset, place, l, *net)).collect(),
            _ => ipset.carry_out(&loads),
        };
        self.unsettled = tallies.is_err();
        for (load, tally) in loads.iter().zip(tallies?) {
            outcome.tally.join(&tally);
            let line = Line::set(place, load.family);
            let fill = self.fill.entry(line).or_default();
            *fill = fill.saturating_add(tally.of(Verdict::Inserted));
            *fill = fill.saturating_sub(tally.of(Verdict::Deleted));
            if *fill == 0 {
                // If that fails, the ticker does it.
                let _ = self.sweep(now);
            }
        }
        Ok(outcome)
    }

    /// Prepares what is to be done with a set; `None` if there is none to take
    /// anything out of.
    fn load<'a>(
        &mut self,
        ipset: &Ipset,
        place: Place,
        nets: &'a [Net],
        put: Option<u32>,
        now: Duration,
    ) -> Result<Option<Load<'a>>, Failure> {
        let Some(family) = nets.first().map(Net::family) else { return Ok(None) };
        let Some(table) = self.tables.iter_mut().find(|table| table.tools.family == family) else {
            return Ok(None);
        };
        let line = Line::set(place, family);
        if !table.mirror.has(&line) {
            if put.is_none() {
                return Ok(None);
            }
            ipset.create(&line.to_string(), family)?;
            table.have_set(line, true, now)?;
            self.fill.insert(line, 0);
        }
        Ok(Some(Load { name: line.to_string(), family, nets, put }))
    }

    /// One address needs no reading of the set.
    fn one(
        &self,
        ipset: &Ipset,
        place: Place,
        load: &Load<'_>,
        net: Net,
    ) -> Result<Tally, Failure> {
        let verdict = match load.put {
            Some(timeout) => ipset.put(&load.name, net, timeout)?,
            None => ipset.delete(&load.name, net)?,
        };
        if load.put.is_some() {
            for rival in place.others().map(|place| Line::set(place, load.family)) {
                if self.tables.iter().any(|table| table.mirror.has(&rival)) {
                    ipset.delete(&rival.to_string(), net)?;
                }
            }
        }
        let mut tally = Tally::default();
        tally.add(verdict, 1);
        Ok(tally)
    }

    /// Ends what was begun with a list. One that the kernel does not take is no
    /// reason not to go on.
    fn settle(&mut self, ipset: &Ipset) -> Result<(), Failure> {
        let whole = match ipset.settle() {
            Ok(whole) => whole,
            Err(failure) => {
                let what = "what was begun with a list cannot be ended";
                self.log.error(format_args!("{what}: {failure}"));
                only_passing(failure)?;
                false
            }
        };
        if !whole {
            cut(&mut self.state, self.doubtful);
        }
        (self.unsettled, self.doubtful) = (false, None);
        Ok(())
    }

    /// Removes the sets that are empty, and the rules of those that are gone.
    pub fn sweep(&mut self, now: Duration) -> Result<(), Failure> {
        let Some(ipset) = self.ipset.clone() else { return Ok(()) };
        if self.unsettled {
            self.settle(&ipset)?;
        }
        if self.fill.is_empty() {
            return Ok(());
        }
        let headers = ipset.headers()?;
        // One whose rule could not be made, or that others held until now.
        let ruled: HashSet<String> = self.fill.keys().map(Line::to_string).collect();
        for header in headers.iter().filter(|h| h.entries == 0 && !ruled.contains(&h.name)) {
            let _ = ipset.destroy(&header.name);
        }
        for table in &mut self.tables {
            for line in table.mirror.sets() {
                let name = line.to_string();
                let header = headers.iter().find(|header| header.name == name);
                let entries = header.map_or(0, |header| header.entries);
                if entries > 0 {
                    self.fill.insert(line, entries);
                    continue;
                }
                table.have_set(line, false, now)?;
                self.fill.remove(&line);
                match header {
                    Some(_) => ipset.destroy(&name)?,
                    None => {
                        let lost = "was removed by others, and what it blocked or let pass with it";
                        self.log.warning(format_args!("the set {name} {lost}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Moves what is found at start to where rfw.conf wants it: into sets, or
    /// out of them; what came from the state file is there already. The error is a
    /// sentence.
    pub fn begin_sets(&mut self, from_state: bool) -> Result<(), String> {
        let now = self.clock.now();
        let found = self.tables.iter().any(|table| !table.mirror.sets().is_empty());
        match self.ipset.clone() {
            Some(ipset) => {
                let moved = if from_state { Ok(()) } else { self.move_in(&ipset, now) };
                moved.and_then(|()| self.tidy(&ipset, now)).map_err(|failure| no_sets(&failure))
            }
            None if from_state => {
                // Those of a former run, whose rules have gone.
                let _ = self.ipset_of_old().map(|ipset| self.destroy_unruled(&ipset));
                Ok(())
            }
            None if !found => Ok(()),
            None => self.move_out(now).map_err(|failure| {
                format!("rfw's rules cannot be taken out of its sets ({failure}); set ipset.path")
            }),
        }
    }

    fn move_in(&mut self, ipset: &Ipset, now: Duration) -> Result<(), Failure> {
        self.settle(ipset)?;
        let headers = ipset.headers()?;
        for table in &mut self.tables {
            for line in table.mirror.sets() {
                let name = line.to_string();
                for header in headers.iter().filter(|header| header.name == name) {
                    table.adopt_set(ipset, line, header)?;
                    self.fill.insert(line, header.entries);
                }
            }
            for line in table.move_rules(ipset, now)? {
                self.fill.insert(line, usize::MAX);
            }
        }
        Ok(())
    }

    /// Destroys sets without a rule: they are of a move that was cut short, or their rule
    /// was flushed while rfw was stopped, or the state file does not name them. What the
    /// kernel does not enforce is no rule.
    fn destroy_unruled(&self, ipset: &Ipset) -> Result<(), Failure> {
        let ruled: HashSet<String> = self.fill.keys().map(Line::to_string).collect();
        for header in ipset.headers()?.iter().filter(|header| !ruled.contains(&header.name)) {
            self.log.warning(format_args!("destroyed the set {}: it has no rule", header.name));
            ipset.destroy(&header.name)?;
        }
        Ok(())
    }

    fn tidy(&mut self, ipset: &Ipset, now: Duration) -> Result<(), Failure> {
        self.destroy_unruled(ipset)?;
        // A new set shows whether sets work at all.
        if self.fill.is_empty() {
            for table in &mut self.tables {
                let (inp, out, end) = (Iface::ANY, Iface::ANY, End::Source);
                let place = Place { target: Target::Drop, chain: Chain::Input, inp, out, end };
                let line = Line::set(place, table.tools.family);
                ipset.create(&line.to_string(), table.tools.family)?;
                table.have_set(line, true, now)?;
                self.fill.insert(line, 0);
            }
        }
        self.sweep(now)
    }

    fn ipset_of_old(&self) -> Option<Ipset> {
        let presence = self.tables.first()?.tools.presence.clone();
        Some(Ipset::new(PathBuf::from(DEFAULT_PATH), 0, presence))
    }

    fn move_out(&mut self, now: Duration) -> Result<(), Failure> {
        let Some(ipset) = self.ipset_of_old() else { return Ok(()) };
        ipset.settle()?;
        for table in &mut self.tables {
            let lines = table.mirror.sets();
            let mut batch = Batch::default();
            for line in &lines {
                let Some(place) = line.place() else { continue };
                ipset.entries(&line.to_string(), START_LIMIT, |entry| {
                    let owned = entry.owned(place, now);
                    if table.whitelist.conflict(&owned.line.rule).is_none() {
                        table.mirror.have(owned.line, Some(owned.expires), &mut batch);
                    }
                    true
                })?;
                table.mirror.have(*line, None, &mut batch);
            }
            if lines.is_empty() {
                continue;
            }
            table.repair(&batch, now.as_secs(), true)?;
            lines.iter().try_for_each(|line| ipset.destroy(&line.to_string()))?;
        }
        Ok(())
    }
}

impl Kernel {
    /// Makes the sets hold what the state file names: their time-outs cannot be moved
    /// when a clock that had shown no real time is set.
    pub fn refill(&mut self) {
        let (Some(ipset), Some(state)) = (&self.ipset, &self.state) else { return };
        let filled = state.kept().map_err(Failure::State);
        if let Err(failure) = filled.and_then(|kept| fill(ipset, &kept, self.clock.now())) {
            self.log.error(format_args!("sets have old times of expiry: {failure}"));
        }
    }
}

/// Every rule as a line of iptables.
pub fn all_plain(kept: &[Kept]) -> Vec<(Line, Option<u64>)> {
    kept.iter().map(|(rule, expires)| (Line::plain(*rule), *expires)).collect()
}

/// What the state file names, less the older ones of rules that differ in their target
/// only: of the sets of a place only one has an address.
pub fn without_rivals(mut kept: Vec<Kept>, state: &mut Option<State>, log: &Log) -> Vec<Kept> {
    let mut seen = HashSet::new();
    kept.reverse();
    let older = kept.extract_if(.., |(rule, _)| {
        rule.place().is_some() && !seen.insert(Rule { target: Target::Drop, ..*rule })
    });
    super::forget(older.map(|(rule, _)| rule).collect(), state, log);
    kept.reverse();
    kept
}

/// Why sets do not work, as a sentence.
pub fn no_sets(failure: &Failure) -> String {
    match failure {
        Failure::Full(sentence) => sentence.to_string(),
        _ => format!(
            "sets do not work here ({failure}); rfw must be root or have CAP_NET_ADMIN and \
             CAP_NET_RAW, and the kernel ip_set_hash_net and xt_set; or leave ipset.path out"
        ),
    }
}

/// How many seconds a set keeps an address that expires then.
fn timeout(expires: Option<u64>, now: Duration) -> Option<u32> {
    let Some(second) = expires else { return Some(0) };
    let left = second.saturating_sub(now.as_secs()).max(1);
    // Before the clock is set nobody knows how long; after that it is filled in anew.
    let left = if now.as_secs() < REAL_TIME { left.min(LONGEST_IN_SET.into()) } else { left };
    u32::try_from(left).ok().filter(|left| *left <= LONGEST_IN_SET)
}

/// Seconds by which the time-out of an entry may differ from what it should be.
const INEXACT: u32 = 2;

/// Makes the sets hold, in one restore, what the state file names; returns the rules for
/// them and for all else, and how many entries each set has.
#[allow(clippy::type_complexity)]
pub fn fill(
    ipset: &Ipset,
    kept: &[Kept],
    now: Duration,
) -> Result<(Vec<(Line, Option<u64>)>, HashMap<Line, usize>), Failure> {
    ipset.settle()?;
    let (mut lines, mut sets) = (Vec::new(), BTreeMap::<Line, BTreeMap<Net, u32>>::new());
    for (rule, expires) in kept {
        match rule.place() {
            None => lines.push((Line::plain(*rule), *expires)),
            Some((place, net)) => {
                let timeout = timeout(*expires, now).ok_or_else(|| too_long(rule))?;
                sets.entry(Line::set(place, rule.family())).or_default().insert(net, timeout);
            }
        }
    }
    let fill = sets.iter().map(|(line, entries)| (*line, entries.len())).collect();
    lines.extend(sets.keys().map(|line| (*line, None)));
    let headers = ipset.headers()?;
    let mut gone = Vec::new();
    for (line, entries) in &mut sets {
        let name = line.to_string();
        if let Some(header) = headers.iter().find(|header| header.name == name) {
            ipset.fit(header, line.rule.family())?;
        }
        ipset.entries(&name, START_LIMIT, |Entry { net, timeout, .. }| {
            match entries.get(&net) {
                None => gone.push((name.clone(), net)),
                Some(wanted)
                    if (*wanted == 0) == (timeout == 0) && wanted.abs_diff(timeout) <= INEXACT =>
                {
                    entries.remove(&net);
                }
                Some(_) => {}
            }
            true
        })?;
    }
    let count = sets.values().map(BTreeMap::len).sum::<usize>();
    ipset.restore(count.saturating_add(gone.len()), |input| {
        for (line, entries) in &sets {
            let name = line.to_string();
            if !headers.iter().any(|header| header.name == name) {
                ipset.write_create(input, &name, line.rule.family(), entries.len())?;
            }
            entries.iter().try_for_each(|(net, timeout)| {
                input.line(format_args!("add {name} {net} timeout {timeout}"))
            })?;
        }
        gone.iter().try_for_each(|(name, net)| input.line(format_args!("del {name} {net}")))
    })?;
    Ok((lines, fill))
}

fn too_long(rule: &Rule) -> Failure {
    let what_to_do = "without ipset.path, DELETE it or PUT it with less";
    Failure::Refused(format!("{rule} lives longer than 24 days: {what_to_do}"))
}

impl Table {
    /// Has the rule for a set, or has it not.
    fn have_set(&mut self, line: Line, wanted: bool, now: Duration) -> Result<(), Failure> {
        let mut batch = Batch::default();
        self.mirror.have(line, wanted.then_some(None), &mut batch);
        let result = self.repair(&batch, now.as_secs(), false);
        if result.is_err() {
            self.mirror.undo(&batch);
        }
        result
    }

    /// Takes a set that is there at start.
    fn adopt_set(&mut self, ipset: &Ipset, line: Line, header: &Header) -> Result<(), Failure> {
        let Some(place) = line.place() else { return Ok(()) };
        let mut listed = Vec::new();
        ipset.entries(&header.name, START_LIMIT, |entry| {
            listed.extend(self.whitelist.overlapping(&entry.net).map(|_| entry.net));
            true
        })?;
        for net in listed {
            ipset.delete(&header.name, net)?;
            self.log.warning(format_args!("removed {}: whitelisted", place.rule(net)));
        }
        ipset.fit(header, self.tools.family)
    }

    /// Moves rules into sets, and says into which. The sets are filled first, and
    /// the rules leave as theirs come, in one transaction.
    fn move_rules(&mut self, ipset: &Ipset, now: Duration) -> Result<Vec<Line>, Failure> {
        let family = self.tools.family;
        let (mut batch, mut lines, mut sets) = (Batch::default(), Vec::new(), Vec::new());
        for (rule, expires) in self.mirror.plain() {
            let Some((place, net)) = rule.place() else { continue };
            let timeout = timeout(expires, now).ok_or_else(|| too_long(&rule))?;
            let set = Line::set(place, family);
            if !self.mirror.has(&set) {
                ipset.create(&set.to_string(), family)?;
                self.mirror.have(set, Some(None), &mut batch);
            }
            sets.push(set);
            self.mirror.have(Line::plain(rule), None, &mut batch);
            lines.push(format!("add {set} {net} timeout {timeout}"));
            // The newer of two wins.
            let rivals = place.others().map(|place| Line::set(place, family));
            let rivals = rivals.filter(|rival| self.mirror.has(rival));
            lines.extend(rivals.map(|rival| format!("del {rival} {net}")));
        }
        if lines.is_empty() {
            return Ok(sets);
        }
        ipset.restore(lines.len(), |input| lines.iter().try_for_each(|line| input.line(line)))?;
        self.repair(&batch, now.as_secs(), true)?;
        self.log.info(format_args!("IP{family:?}: {} rules moved into sets", sets.len()));
        Ok(sets)
    }
}
