//! The firewall: the interface between the rest of rfw and the kernel.
//!
//! A change travels [`queue`] → [`engine`] → [`list`] → [`crate::state`] → [`iptables`] or
//! [`ipset`] → [`process`]. A check of the kernel travels back: [`iptables`] and [`ipset`] read,
//! [`reconcile`] and [`sets`] compare, and [`repair`] rewrites. [`start`] reads the list first and does
//! the same.

pub mod engine;
pub mod ipset;
pub mod iptables;
pub mod leftovers;
pub mod list;
pub mod lock;
pub mod prerequisites;
pub mod process;
pub mod queue;
pub mod reconcile;
pub mod repair;
pub mod report;
pub mod sets;
pub mod start;

use crate::clock;
use crate::host;
use crate::http::api_error::ApiError;
use crate::http::auth::Principal;
use crate::log::Log;
use crate::metrics::Metrics;
use crate::rule::net::{Family, Net};
use crate::rule::tag::Tag;
use crate::rule::whitelist::{Permitted, Whitelist};
use crate::rule::{Change, Filter, Iface, Match, Rule, Rules, Target};
use crate::state::StateFile;
use engine::{Engine, Kernel, START_TOOL_LIMIT, Settings};
use ipset::{Ipset, SetEdit, SetEntry, SetHeader};
use iptables::{Iptables, KernelRule, RuleEdit, RuleKind, TaggedRule};
use list::Outcome;
use prerequisites::Version;
use process::ToolError;
use queue::Queue;
use reconcile::{Listing, MAX_DELETED};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// The time limit for reading a set for a client, a little longer than that of its response.
const SEND_LIMIT: Duration = Duration::from_secs(70);
/// How many edits iptables-nft takes at once in a rootless container: without CAP_NET_ADMIN on the host,
/// it cannot enlarge its socket's buffer.
const ROOTLESS_EDITS: usize = 200;
const NOT_APPLIED: &str = "The list was not applied.";

/// The programs that read and write the kernel's rules and sets.
#[derive(Clone)]
pub struct Tools {
    /// One for each family that this host filters.
    pub iptables: Vec<Iptables>,
    pub ipset: Ipset,
}

impl Tools {
    fn iptables(&self, family: Family) -> Result<&Iptables, ToolError> {
        let found = self.iptables.iter().find(|iptables| iptables.family == family);
        found.ok_or_else(|| ToolError::Rejected(format!("This host has no {family}.")))
    }
}

impl Kernel for Tools {
    fn families(&self) -> Vec<Family> {
        self.iptables.iter().map(|iptables| iptables.family).collect()
    }

    fn read_rules(&self, family: Family, limit: Duration) -> Result<Listing, ToolError> {
        let mut listing = Listing::default();
        let push = |chain, row, line: &str| listing.push(chain, row, line);
        self.iptables(family)?.read(limit, push)?;
        Ok(listing)
    }

    fn write_rules(
        &self,
        family: Family,
        edits: &[RuleEdit],
        limit: Duration,
    ) -> Result<(), ToolError> {
        self.iptables(family)?.write(edits, limit)
    }

    fn read_headers(&self, limit: Duration) -> Result<Vec<SetHeader>, ToolError> {
        self.ipset.headers(limit)
    }

    fn read_set(&self, name: &str, limit: Duration) -> Result<Option<Vec<(Net, u32)>>, ToolError> {
        let mut entries = Vec::new();
        let exists = self.ipset.read(name, limit, |entry| {
            entries.push((entry.net, entry.timeout));
            true
        })?;
        entries.sort_unstable();
        Ok(Some(entries).filter(|_| exists))
    }

    fn write_sets(
        &self,
        edits: &mut dyn Iterator<Item = SetEdit<'_>>,
        limit: Duration,
    ) -> Result<(), ToolError> {
        self.ipset.write(edits, limit)
    }
}

pub struct Firewall {
    queue: Queue<Engine<Tools>, Change, Result<Outcome, ApiError>>,
    tools: Tools,
}

impl Firewall {
    /// Reads the list from the state file or, without one, from the kernel, and makes the kernel
    /// match it. `guarded` is the port that guard rules protect. The error is a sentence.
    pub fn start(
        tools: Tools,
        state: Option<StateFile>,
        sets: Option<usize>,
        guarded: Option<u16>,
        whitelist: &Whitelist,
        log: Arc<Log>,
        metrics: Arc<Metrics>,
    ) -> Result<Firewall, String> {
        let families = tools.families().into_iter();
        let guards = guarded.map_or(Vec::new(), |port| {
            families.flat_map(|family| guards(whitelist, family, port)).collect()
        });
        let max_edits = if host::is_rootless() { ROOTLESS_EDITS } else { usize::MAX };
        let is_nft = |Iptables { family, iptables, .. }: &Iptables| {
            Version::of(iptables, *family, START_TOOL_LIMIT).is_ok_and(|version| version.is_nft)
        };
        let has_two = thread::available_parallelism().is_ok_and(|count| count.get() > 1);
        let is_nft = tools.iptables.iter().all(is_nft);
        let reads_at_once = has_two && is_nft;
        let max_deletions = if is_nft { MAX_DELETED } else { usize::MAX };
        let settings = Settings { guards, sets, max_edits, max_deletions, reads_at_once };
        let engine = start::start(tools.clone(), state, settings, whitelist, log, metrics)?;
        Ok(Firewall { queue: Queue::new(engine), tools })
    }

    /// Carries out a change. When this returns, the kernel enforces all of it or, after an error,
    /// none of it.
    pub fn apply(&self, _principal: &Principal, change: Permitted) -> Result<Outcome, ApiError> {
        let change = change.into_change();
        // Only IPv6 can be missing; a list then has none of it.
        if change.family() == Some(Family::V6) && !self.tools.families().contains(&Family::V6) {
            return Err(ApiError::NoIpv6);
        }
        let is_long = change.family().is_none();
        let note = if matches!(change.rules, Rules::List(..)) { NOT_APPLIED } else { "" };
        let result = self.queue.submit(change, is_long, |engine, changes| {
            let results = engine.commit(&changes);
            let is_hung =
                |result: &&_| matches!(result, Err(ApiError::Busy(_))) && !engine.has_time();
            let outage = results.iter().find(is_hung).cloned();
            (results, outage)
        });
        match result {
            Some(result) => result.map_err(|error| error.with_note(note)),
            None => Err(ApiError::Busy("The change was not carried out.".into())),
        }
    }

    /// All of rfw's rules except the guards, from the kernel, each with its number among all rules of
    /// its chain, counted from 1. They are read completely before a byte is sent, and while nothing
    /// is written: iptables lists rules twice while others change, and iptables-legacy holds the
    /// xtables lock until its output is read. A few addresses in sets come from the list, without
    /// counters, and the kernel confirms each.
    pub fn list(
        &self,
        _principal: &Principal,
        filter: &Filter,
    ) -> Result<Vec<(usize, TaggedRule)>, ApiError> {
        let listing = self.queue.with(|engine| (engine.listing(filter), None));
        let mut confirmed = Vec::new();
        for (number, tagged) in listing? {
            // A rule without counters comes from the list.
            let listed = tagged.rule.rule.template().filter(|_| tagged.counters.is_none());
            let is_held = listed.map_or(Ok(true), |(template, net)| {
                let set = KernelRule::set(template, net.family()).to_string();
                self.tools.ipset.contains(&set, net, SEND_LIMIT)
            });
            if is_held? {
                confirmed.push((number, tagged));
            }
        }
        Ok(confirmed)
    }

    /// Passes a listed rule to `each` or, if it is that of a set, the entries that a filter admits,
    /// as rules, until `each` returns `false`. No Mutex is held.
    pub fn entries(
        &self,
        listed: &TaggedRule,
        filter: &Filter,
        mut each: impl FnMut(&TaggedRule) -> bool,
    ) -> Result<(), ApiError> {
        let Some(template) = listed.rule.template() else {
            each(listed);
            return Ok(());
        };
        let now = clock::wall().as_secs();
        let read = self.tools.ipset.read(&listed.rule.to_string(), SEND_LIMIT, |entry| {
            let SetEntry { net, timeout, counters } = entry;
            // ipset rounds down to whole seconds.
            let expires = now.saturating_add(timeout.into()).saturating_add(1);
            let expires = Some(expires).filter(|_| timeout > 0);
            let rule = KernelRule::plain(template.rule(net));
            let counters = Some(counters);
            let is_shown = timeout != ipset::NOMATCH && filter.admits(&rule.rule);
            !is_shown || each(&TaggedRule { rule, expires, counters })
        });
        Ok(read.map(|_| ())?)
    }

    /// Reports rules of rfw 0.2.2, and those in the other variant of iptables.
    pub fn report_leftovers(&self, log: &Log) {
        self.tools.iptables.iter().for_each(|iptables| leftovers::report(iptables, log));
    }

    /// To be called every second: follows the wall clock, deletes rules that are due, and checks
    /// that the kernel matches the list. Returns when to call it again: expiries are whole seconds, so
    /// rules are due when one begins.
    pub fn tick(&self) -> Duration {
        self.queue.with(|engine| {
            let hung = engine.tick().map(|error| Err(error.into()));
            (engine.clock.until_next_second(), hung)
        })
    }
}

/// The rules for rfw's own port, which admit only whitelisted peers.
fn guards(whitelist: &Whitelist, family: Family, port: u16) -> Vec<TaggedRule> {
    let nets = whitelist.nets().iter().filter(|net| net.family() == family);
    let accepted = nets.map(|net| (Target::Accept, *net));
    let all = accepted.chain([(Target::Drop, Net::any(family))]);
    let (iface, tag, kind) = (Iface::ANY, Tag::NONE, RuleKind::Guard(port));
    let guards = all.flat_map(|(target, net)| {
        let both = [Match::Input { iface, source: net }, Match::Output { iface, destination: net }];
        both.map(|matches| KernelRule { rule: Rule { target, matches, tag }, kind })
    });
    guards.map(|rule| TaggedRule::new(rule, None)).collect()
}
