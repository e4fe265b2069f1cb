//! What the command function does with sets: one for each place and family that
//! has addresses, and one rule for each set, which stands before all others.
//!
//! The entries are the kernel's alone, and so is their expiry. A set and its rule
//! are made before its first entry; both go when the last one has gone.

use super::exec::Failure;
use super::ipset::{DEFAULT_PATH, Entry, Header, Ipset, Load, parse_name};
use super::kernel::{Line, Owned};
use super::mirror::Batch;
use super::{Kernel, Outcome, Table, Tally, Verdict};
use crate::rule::interval::LONGEST_IN_SET;
use crate::rule::net::Net;
use crate::rule::{Action, Chain, Change, End, Iface, Place, Rules, Target};
use std::collections::HashSet;
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

impl Kernel {
    /// Carries out a change of rules that sets stand for.
    pub fn commit_to_sets(
        &mut self,
        ipset: &Ipset,
        change: &Change,
        now: Duration,
    ) -> Result<Outcome, Failure> {
        match self.try_sets(ipset, change, now) {
            // Others have destroyed a set.
            Err(Failure::Refused(words)) if words.contains("does not exist") => {
                self.sweep(now)?;
                self.try_sets(ipset, change, now)
            }
            result => result,
        }
    }

    fn try_sets(
        &mut self,
        ipset: &Ipset,
        change: &Change,
        now: Duration,
    ) -> Result<Outcome, Failure> {
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
        let mut outcome = Outcome { tally: Tally::default(), expires };
        let mut loads = Vec::new();
        for nets in nets.chunk_by(|a, b| a.family() == b.family()) {
            let load = self.load(ipset, place, nets, put, now)?;
            match load {
                Some(load) => loads.push(load),
                None => outcome.tally.add(Verdict::Absent, nets.len()),
            }
        }
        let tallies = match single {
            Some(net) => loads.iter().map(|load| self.one(ipset, place, load, net)).collect(),
            None => ipset.carry_out(&loads),
        };
        for (load, tally) in loads.iter().zip(tallies?) {
            self.close(load, place, &tally, now)?;
            outcome.tally.join(&tally);
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
        let ruled = |net: &&Net| table.mirror.has(&Line::plain(place.rule(**net)));
        let ruled: Vec<Net> = nets.iter().filter(ruled).copied().collect();
        if !table.mirror.has(&line) {
            if put.is_none() && ruled.is_empty() {
                return Ok(None);
            }
            ipset.create(&line.to_string(), family)?;
            table.have_set(line, true, now)?;
            self.fill.insert(line, 0);
        }
        Ok(Some(Load { name: line.to_string(), family, nets, put, ruled }))
    }

    /// One address needs no reading of the set.
    fn one(
        &self,
        ipset: &Ipset,
        place: Place,
        load: &Load<'_>,
        net: Net,
    ) -> Result<Tally, Failure> {
        let mut verdict = match load.put {
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
        if !load.ruled.is_empty() {
            verdict = if load.put.is_some() { Verdict::Refreshed } else { Verdict::Deleted };
        }
        let mut tally = Tally::default();
        tally.add(verdict, 1);
        Ok(tally)
    }

    /// What is left to do when the addresses are where they belong.
    fn close(
        &mut self,
        load: &Load<'_>,
        place: Place,
        tally: &Tally,
        now: Duration,
    ) -> Result<(), Failure> {
        if !load.ruled.is_empty() {
            let rules = Rules::List(place, load.ruled.clone());
            let deletion = Change { rules, action: Action::Delete };
            for table in self.tables.iter_mut().filter(|t| t.tools.family == load.family) {
                table.commit_all(&[&deletion], now)?;
            }
        }
        let fill = self.fill.entry(Line::set(place, load.family)).or_default();
        *fill = fill.saturating_add(tally.of(Verdict::Inserted));
        *fill = fill.saturating_sub(tally.of(Verdict::Deleted));
        if *fill == 0 {
            // If that fails, the ticker does it.
            let _ = self.sweep(now);
        }
        Ok(())
    }

    /// Removes the sets that are empty, and the rules of those that are gone.
    pub fn sweep(&mut self, now: Duration) -> Result<(), Failure> {
        let Some(ipset) = self.ipset.clone() else { return Ok(()) };
        let headers = ipset.headers()?;
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
        // One whose rule could not be made, or that others held until now.
        let ruled: HashSet<String> = self.fill.keys().map(Line::to_string).collect();
        for header in headers.iter().filter(|h| h.entries == 0 && !ruled.contains(&h.name)) {
            let _ = ipset.destroy(&header.name);
        }
        Ok(())
    }

    /// Moves what is found at start to where rfw.conf wants it: into sets, or
    /// out of them. The error is a sentence.
    pub fn begin_sets(&mut self) -> Result<(), String> {
        let now = self.clock.now();
        let found = self.tables.iter().any(|table| !table.mirror.sets().is_empty());
        match self.ipset.clone() {
            Some(ipset) => self.move_in(&ipset, now).map_err(|failure| {
                format!(
                    "sets do not work here ({failure}); rfw must be root or have CAP_NET_ADMIN and \
                     CAP_NET_RAW, and the kernel ip_set_hash_net and xt_set; or leave ipset.path out"
                )
            }),
            None if !found => Ok(()),
            None => self.move_out(now).map_err(|failure| {
                format!("rfw's rules cannot be taken out of its sets ({failure}); set ipset.path")
            }),
        }
    }

    fn move_in(&mut self, ipset: &Ipset, now: Duration) -> Result<(), Failure> {
        ipset.settle()?;
        let headers = ipset.headers()?;
        let mut known = HashSet::new();
        for table in &mut self.tables {
            let family = table.tools.family;
            for header in &headers {
                let line = match (parse_name(&header.name), table.mirror.sets()) {
                    (Some((place, theirs)), _) if theirs == family => Line::set(place, family),
                    (None, lines) => match lines.iter().find(|l| l.to_string() == header.name) {
                        Some(line) => *line,
                        None => continue,
                    },
                    _ => continue,
                };
                known.insert(&header.name);
                table.adopt_set(ipset, line, header, now)?;
                self.fill.insert(line, header.entries);
            }
            table.move_rules(ipset, now)?;
        }
        for header in headers.iter().filter(|header| !known.contains(&header.name)) {
            let what = "has no rule, and its name does not say of which interfaces: destroy it";
            self.log.warning(format_args!("the set {} {what}", header.name));
        }
        // A new set shows whether sets work at all.
        if self.tables.iter().all(|table| table.mirror.sets().is_empty()) {
            for table in &mut self.tables {
                let (inp, out, end) = (Iface::ANY, Iface::ANY, End::Source);
                let place = Place { target: Target::Drop, chain: Chain::Input, inp, out, end };
                let line = Line::set(place, table.tools.family);
                ipset.create(&line.to_string(), table.tools.family)?;
                table.have_set(line, true, now)?;
            }
        }
        self.sweep(now)
    }

    fn move_out(&mut self, now: Duration) -> Result<(), Failure> {
        let Some(table) = self.tables.first() else { return Ok(()) };
        let presence = table.tools.presence.clone();
        let ipset = Ipset::new(PathBuf::from(DEFAULT_PATH), 0, presence);
        ipset.settle()?;
        for table in &mut self.tables {
            let lines = table.mirror.sets();
            let mut batch = Batch::default();
            for line in &lines {
                let Some(place) = line.place() else { continue };
                ipset.entries(&line.to_string(), |entry| {
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
    fn adopt_set(
        &mut self,
        ipset: &Ipset,
        line: Line,
        header: &Header,
        now: Duration,
    ) -> Result<(), Failure> {
        let Some(place) = line.place() else { return Ok(()) };
        let mut listed = Vec::new();
        ipset.entries(&header.name, |entry| {
            listed.extend(self.whitelist.overlapping(&entry.net).map(|_| entry.net));
            true
        })?;
        for net in listed {
            ipset.delete(&header.name, net)?;
            self.log.warning(format_args!("removed {}: whitelisted", place.rule(net)));
        }
        if header.maxelem != ipset.maxelem && header.entries <= ipset.maxelem {
            ipset.resize(&header.name, self.tools.family, header.entries)?;
        }
        match self.mirror.has(&line) {
            true => Ok(()),
            false => self.have_set(line, true, now),
        }
    }

    /// Moves rules into sets, as far as those can keep their expiry. The sets
    /// are filled first, and the rules leave as theirs come, in one transaction.
    fn move_rules(&mut self, ipset: &Ipset, now: Duration) -> Result<(), Failure> {
        let family = self.tools.family;
        let mut batch = Batch::default();
        let mut lines = Vec::new();
        for (rule, expires) in self.mirror.movable() {
            let left = expires.map(|second| second.saturating_sub(now.as_secs()).max(1));
            let Some((place, net)) = rule.place() else { continue };
            let set = Line::set(place, family);
            let timeout = u32::try_from(left.unwrap_or(0)).ok().filter(|t| *t <= LONGEST_IN_SET);
            if let Some(timeout) = timeout {
                if !self.mirror.has(&set) {
                    ipset.create(&set.to_string(), family)?;
                    self.mirror.have(set, Some(None), &mut batch);
                }
                self.mirror.have(Line::plain(rule), None, &mut batch);
                lines.push(format!("add {set} {net} timeout {timeout}"));
            }
            // The newer of two wins, even where it remains a rule.
            let rivals = place.others().map(|place| Line::set(place, family));
            let rivals = rivals.filter(|rival| self.mirror.has(rival));
            lines.extend(rivals.map(|rival| format!("del {} {net}", rival)));
        }
        if lines.is_empty() {
            return Ok(());
        }
        ipset.restore(lines.len(), |input| lines.iter().try_for_each(|line| input.line(line)))?;
        self.log.info(format_args!("IP{family:?}: rules moved into sets"));
        self.repair(&batch, now.as_secs(), true)
    }
}
