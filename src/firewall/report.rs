//! How the engine reports checks and repairs: the log, the metrics, and how often foreign rules came
//! first.

use super::engine::{Engine, Kernel};
use super::iptables::{KernelRule, TaggedRule};
use super::list::{Batch, Group};
use super::reconcile::{Listing, Plan};
use crate::log::{Level, printable};
use crate::metrics::{Label, Usage};
use crate::rule::net::Family;
use crate::rule::tag::Tag;
use crate::rule::{Chain, RuleTemplate, Target};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::time::{Duration, Instant};

/// How often rfw moves its rules to the front immediately within [`OVERTAKEN_WINDOW`]; after that,
/// once a minute, because two programs that both want to be first would fight forever.
const MAX_OVERTAKEN: usize = 10;
const OVERTAKEN_WINDOW: Duration = Duration::from_secs(600);
const OVERTAKEN_PAUSE: Duration = Duration::from_secs(60);
/// How many rules of one event are logged one by one.
const MAX_LOGGED: usize = 1_000;

impl<K: Kernel> Engine<K> {
    pub(super) fn is_overtaken_often(&self, family: Family) -> bool {
        let is_within = |at: Option<&Instant>, window| at.is_some_and(|at| at.elapsed() < window);
        self.overtaken.get(&family).is_some_and(|times| {
            times.len() >= MAX_OVERTAKEN
                && is_within(times.front(), OVERTAKEN_WINDOW)
                && is_within(times.back(), OVERTAKEN_PAUSE)
        })
    }

    /// Logs what was repaired, except what the batch in progress changes.
    pub(super) fn report_rules(&mut self, family: Family, plans: Vec<Plan>, batch: Option<&Batch>) {
        let mut changed: HashSet<KernelRule> = HashSet::new();
        if let Some(batch) = batch {
            changed.extend(batch.created.iter().filter_map(Group::set));
            let rules = self.list.differences(batch, |group| !self.list.is_in_set(group));
            changed.extend(rules.map(|difference| KernelRule::plain(difference.rule())));
        }
        let now = self.now();
        let (mut missing, mut expired, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
        let mut overtaken_by = Vec::new();
        for plan in plans {
            missing.extend(plan.missing.into_iter().filter(|rule| !changed.contains(rule)));
            for TaggedRule { rule, expires, .. } in plan.unknown {
                match expires.is_some_and(|second| second <= now) {
                    _ if changed.contains(&rule) || self.is_outdated(&rule) => {}
                    true => expired.push(rule),
                    false => unknown.push(rule),
                }
            }
            overtaken_by.extend(plan.overtaken_by);
        }
        self.report_overtaken(family, &overtaken_by);
        self.report_restored(missing.len());
        if !self.is_starting {
            self.log_each(Level::Info, "restored", &missing);
        }
        self.metrics.expired.add(expired.len());
        self.log_each(Level::Info, "expired", &expired);
        self.log_each(Level::Warning, "removed, not one of rfw's current rules:", &unknown);
    }

    /// Whether a start finds what an earlier one left: a guard for another port or whitelist, the rule
    /// of a set that is empty or not used any more, or a rule of the list that is now in a set.
    fn is_outdated(&self, rule: &KernelRule) -> bool {
        let is_left = rule.is_guard() || rule.template().is_some();
        self.is_starting && (is_left || self.list.contains(&rule.rule))
    }

    pub(super) fn report_restored(&self, count: usize) {
        if count > 0 && !self.is_starting {
            self.metrics.restored.add(count);
            self.log.warning(format_args!(
                "restored rules that another program or a failed change had removed: {count}; to \
                 remove a rule for good, DELETE it"
            ));
        }
    }

    pub(super) fn report_removed(&self, count: usize) {
        if count > 0 && !self.is_starting {
            self.log.warning(format_args!(
                "removed addresses from sets that are not rfw's current rules: {count}"
            ));
        }
    }

    /// Counts foreign rules in several chains once: most programs insert theirs into several together.
    fn report_overtaken(&mut self, family: Family, lines: &[String]) {
        if lines.is_empty() {
            return;
        }
        self.metrics.overtaken.add(1);
        let times = self.overtaken.entry(family).or_default();
        times.push_back(Instant::now());
        if times.len() > MAX_OVERTAKEN {
            times.pop_front();
        }
        let notice = match self.is_overtaken_often(family) {
            true => "; this happens so often that rfw waits a minute before it moves them again",
            false => "",
        };
        for line in lines {
            self.log.warning(format_args!(
                "moved rfw's rules back to the front; another program's rule preceded them: {}{notice}",
                printable(line.as_bytes())
            ));
        }
    }

    pub(super) fn log_each(&self, level: Level, event: &str, rules: &[KernelRule]) {
        for rule in rules.iter().take(MAX_LOGGED) {
            self.log.write(level, format_args!("{event} {rule}"));
        }
        if let Some(rest) = rules.len().checked_sub(MAX_LOGGED).filter(|rest| *rest > 0) {
            self.log.write(level, format_args!("{event} {rest} more"));
        }
    }

    /// Counts what each rule has matched since the last complete listing. One that was inserted again
    /// starts at zero.
    pub(super) fn count_traffic(&mut self, family: Family, listing: &Listing) {
        let last = self.listed.remove(&family).unwrap_or_default();
        let mut listed = HashMap::new();
        for (_, TaggedRule { rule, counters, .. }) in listing.own() {
            let used = counters.filter(|(packets, _)| *packets > 0 && !rule.is_guard());
            let Some((packets, bytes)) = used else { continue };
            let key = BuildHasherDefault::<DefaultHasher>::default().hash_one(rule);
            let before = last.get(&key).filter(|(before, _)| *before <= packets);
            let before = before.copied().unwrap_or_default();
            let label = (rule.rule.chain(), rule.rule.target, rule.rule.tag);
            let total = self.traffic.entry(label).or_default();
            total.0 = total.0.saturating_add(packets.saturating_sub(before.0));
            total.1 = total.1.saturating_add(bytes.saturating_sub(before.1));
            listed.insert(key, (packets, bytes));
        }
        self.listed.insert(family, listed);
    }

    /// Counts the rules and their traffic by label.
    pub(super) fn count_rules(&mut self) {
        let mut usage: BTreeMap<Label, Usage> = BTreeMap::new();
        for chain in Chain::ALL {
            usage.extend(Target::ALL.map(|target| ((chain, target, Tag::NONE), Usage::default())));
        }
        for (group, count) in self.list.counts() {
            let RuleTemplate { chain, target, tag, .. } = group.template;
            let rules = &mut usage.entry((chain, target, tag)).or_default().rules;
            *rules = rules.saturating_add(count);
        }
        self.traffic.retain(|label, _| usage.contains_key(label));
        for (label, usage) in &mut usage {
            (usage.packets, usage.bytes) = self.traffic.get(label).copied().unwrap_or_default();
        }
        self.metrics.set_usage(usage);
    }
}
