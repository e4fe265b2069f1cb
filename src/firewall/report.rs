//! What the engine tells of a check or a repair: the log, the metrics, and how often other people's
//! rules came first.

use super::engine::{Engine, Kernel};
use super::iptables::{KernelRule, TaggedRule};
use super::list::{Batch, Group};
use super::reconcile::Plan;
use crate::log::Level;
use crate::rule::{Chain, Target};
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// How often rfw moves to the front at once within [`OVERTAKEN_WINDOW`]; after that, once a
/// minute, because two programs that both want to be first would fight forever.
const MAX_OVERTAKEN: usize = 10;
const OVERTAKEN_WINDOW: Duration = Duration::from_secs(600);
const OVERTAKEN_PAUSE: Duration = Duration::from_secs(60);
/// How many rules of one event are logged one by one.
const MAX_LOGGED: usize = 1_000;

impl<K: Kernel> Engine<K> {
    pub(super) fn is_overtaken_often(&self) -> bool {
        let is_within = |at: Option<&Instant>, window| at.is_some_and(|at| at.elapsed() < window);
        self.overtaken.len() >= MAX_OVERTAKEN
            && is_within(self.overtaken.front(), OVERTAKEN_WINDOW)
            && is_within(self.overtaken.back(), OVERTAKEN_PAUSE)
    }

    /// Logs what was wrong, apart from what the batch in progress changes.
    pub(super) fn report_rules(&mut self, plans: Vec<Plan>, batch: Option<&Batch>) {
        let mut changed: HashSet<KernelRule> = HashSet::new();
        if let Some(batch) = batch {
            changed.extend(batch.created.iter().filter_map(Group::set));
            let rules = self.list.differences(batch).filter(|d| !self.list.is_in_set(&d.group));
            changed.extend(rules.map(|difference| KernelRule::plain(difference.rule())));
        }
        let now = self.now();
        let (mut missing, mut expired, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
        for plan in plans {
            missing.extend(plan.missing.into_iter().filter(|rule| !changed.contains(rule)));
            for TaggedRule { rule, expires, .. } in plan.unknown {
                match expires.is_some_and(|second| second <= now) {
                    _ if changed.contains(&rule) => {}
                    true => expired.push(rule),
                    false => unknown.push(rule),
                }
            }
            if let Some(line) = plan.overtaken_by {
                self.report_overtaken(&line);
            }
        }
        self.report_restored(missing.len());
        if !self.is_starting {
            self.log_each(Level::Info, "restored", &missing);
        }
        self.metrics.expired.add(expired.len());
        self.log_each(Level::Info, "expired", &expired);
        self.log_each(Level::Warning, "removed, because it is not in the list:", &unknown);
    }

    pub(super) fn report_restored(&self, count: usize) {
        if count > 0 && !self.is_starting {
            self.metrics.restored.add(count);
            self.log.warning(format_args!(
                "rules restored that someone else had removed: {count}; to remove a rule for \
                 good, DELETE it"
            ));
        }
    }

    fn report_overtaken(&mut self, line: &str) {
        self.metrics.overtaken.add(1);
        self.overtaken.push_back(Instant::now());
        if self.overtaken.len() > MAX_OVERTAKEN {
            self.overtaken.pop_front();
        }
        self.log.warning(format_args!(
            "moved rfw's rules back to the front; someone else's rule was before them: {line}"
        ));
    }

    pub(super) fn log_each(&self, level: Level, what: &str, rules: &[KernelRule]) {
        for rule in rules.iter().take(MAX_LOGGED) {
            self.log.write(level, format_args!("{what} {rule}"));
        }
        if let Some(more) = rules.len().checked_sub(MAX_LOGGED).filter(|more| *more > 0) {
            self.log.write(level, format_args!("{what} {more} more"));
        }
    }

    pub(super) fn count_rules(&self) {
        for (chain, row) in Chain::ALL.iter().zip(&self.metrics.rules) {
            for (target, number) in Target::ALL.iter().zip(row) {
                number.set(self.list.count(*chain, *target));
            }
        }
    }
}
