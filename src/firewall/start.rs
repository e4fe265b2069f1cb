//! The start, in order: reads the list from the state file or, without one, from the kernel; then
//! makes the kernel match it, whatever the form in which rfw kept its rules before.

use super::engine::{Engine, Kernel, Settings};
use super::ipset::{NOMATCH, SetEdit};
use super::iptables::{KernelRule, RuleEdit, RuleKind, TaggedRule};
use super::list::{List, MAX_RULES};
use super::process::ToolError;
use super::reconcile::Listing;
use super::repair::Moved;
use crate::log::{Log, printable};
use crate::metrics::Metrics;
use crate::rule::net::{Family, Net};
use crate::rule::tag::Tag;
use crate::rule::whitelist::{LineError, Whitelist};
use crate::rule::{Chain, Iface, Rule, RuleTemplate, Side, Target};
use crate::state::{Record, StateFile};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::thread;

/// Reads the list and makes the kernel match it. The error is a sentence.
pub fn start<K: Kernel>(
    kernel: K,
    state: Option<StateFile>,
    settings: Settings,
    whitelist: &Whitelist,
    log: Arc<Log>,
    metrics: Arc<Metrics>,
) -> Result<Engine<K>, String> {
    let sets = settings.sets;
    let mut engine = Engine::new(kernel, state, settings, log.clone(), metrics);
    let is_new = engine.state.as_ref().is_none_or(StateFile::is_new);
    let listings = read_listings(&engine, is_new)?;
    engine.list = match &mut engine.state {
        Some(state) if !is_new => {
            replay(state, sets, &log).map_err(|error| error.at(state.path()))?
        }
        _ => twice(|| adopt(&engine, &listings)).map_err(|error| no_sets(&error))?,
    };
    engine.list.lacks_ipv6 = !engine.kernel.families().contains(&Family::V6);
    let now = engine.clock.now().as_secs();
    for family in Family::ALL {
        while !engine.list.expire(family, now).is_empty() {}
    }
    let has_dropped = drop_whitelisted(&mut engine.list, whitelist, &log);
    if engine.list.drop_rivals() || has_dropped {
        // Otherwise, if a change deleted what replaces a dropped rule, the next start would read it
        // back.
        engine.state.iter_mut().for_each(|state| state.is_outdated = true);
    }
    check_limits(&engine.list)?;
    for (family, listing) in listings {
        twice(|| try_kernel(&engine, family, &listing))?;
        let mut moved = Moved::new();
        if sets.is_some() {
            moved = twice(|| engine.repair_sets(family, None)).map_err(|error| no_sets(&error))?;
        }
        let checked = engine.check_rules(family, Some(listing), None, false).or_else(|_| {
            engine.distrusted.insert(family);
            engine.settle(&[family], None)
        });
        checked.map_err(|error| not_accepted(&error, "xt_comment"))?;
        twice(|| engine.delete_moved(family, &moved)).map_err(|error| no_sets(&error))?;
        let counts = engine.list.counts().filter(|(group, _)| group.family == family);
        let count: usize = counts.map(|(_, count)| count).sum();
        log.info(format_args!("{family}: {count} rules"));
    }
    destroy_leftovers(&engine, &log);
    if is_new {
        engine.compact()?;
    }
    engine.is_starting = false;
    Ok(engine)
}

/// The failure of one system call must not keep rfw from starting: the network may start without the
/// rules then.
fn twice<T, E>(mut attempt: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    attempt().or_else(|_| attempt())
}

/// A listing of each family. If the list is read from it, two must agree (goal 3 of the engine);
/// otherwise the check that compares it with the list sees to that. On two processors, reading two at
/// once takes little longer than one.
fn read_listings<K: Kernel>(
    engine: &Engine<K>,
    is_list: bool,
) -> Result<Vec<(Family, Listing)>, String> {
    let read = |family| {
        thread::scope(|scope| {
            let read = || engine.read_rules(family);
            let spawn = || thread::Builder::new().spawn_scoped(scope, read).ok();
            let reads_two = is_list && engine.settings.reads_at_once;
            let other = reads_two.then(spawn).flatten();
            let listing = read()?;
            // Without a second listing that agrees, more are read.
            match other.and_then(|other| other.join().ok()?.ok()) {
                Some(other) if other.agrees_with(&listing) => Ok((family, listing)),
                _ if is_list => Ok((family, engine.confirmed_rules(family, listing)?)),
                _ => Ok((family, listing)),
            }
        })
    };
    let families = engine.kernel.families().into_iter();
    let listings: Result<_, ToolError> = families.map(|family| twice(|| read(family))).collect();
    listings.map_err(|error| {
        let advice = match error.is_transient() {
            false if error.to_string().contains("incompatible") => {
                "iptables cannot list a table with rules that nft has made; move these, which nft list \
                 ruleset shows, to a table of their own"
            }
            true => "find out which program that is, or what holds it up, and start rfw again",
            false => {
                "run rfw as root or with CAP_NET_ADMIN, and check iptables.path (for iptables-legacy, \
                 and while the kernel holds rules for sets, the systemd unit needs the drop-in that \
                 rfw.service shows)"
            }
        };
        format!("cannot read the kernel's rules ({error}); {advice}")
    })
}

/// The list from the state file. An incomplete last change is dropped.
fn replay(state: &mut StateFile, sets: Option<usize>, log: &Log) -> Result<List, LineError> {
    loop {
        let mut list = List::new(sets);
        let contents = state.replay(|record| match record {
            Record::Put(rule, expires) => list.insert(&rule, expires),
            Record::Delete(rule) => list.remove(&rule),
        })?;
        let Some(tail) = contents.tail else { return Ok(list) };
        log.warning(format_args!("{}", tail.at(state.path())));
        for line in contents.dropped {
            log.warning(format_args!("dropped: {}", printable(&line)));
        }
    }
}

/// The list from the kernel. A rule nearer to the front of a chain is newer.
pub(super) fn adopt<K: Kernel>(
    engine: &Engine<K>,
    listings: &[(Family, Listing)],
) -> Result<List, ToolError> {
    let mut list = List::new(engine.settings.sets);
    for chain in listings.iter().flat_map(|(_, listing)| &listing.0) {
        let own: Vec<&TaggedRule> = chain.own().map(|(_, tagged)| tagged).collect();
        for TaggedRule { rule, expires, .. } in own.into_iter().rev() {
            let Some(template) = rule.template() else {
                if rule.kind == RuleKind::Plain {
                    list.insert(&rule.rule, *expires);
                }
                continue;
            };
            // The set of a listed rule exists.
            let missing = || ToolError::Transient(format!("ipset does not list {rule}."));
            let name = rule.to_string();
            let (_, set) = engine.confirmed_set(&name, engine.read_set(&name)?)?;
            // Only now, so that none expires early: to read a large set takes seconds.
            let now = engine.clock.now().as_secs();
            for (net, left) in set.ok_or_else(missing)?.into_iter().filter(|(_, t)| *t != NOMATCH) {
                let expires = (left > 0).then(|| now.saturating_add(left.into()).saturating_add(1));
                list.insert(&template.rule(net), expires);
            }
        }
    }
    Ok(list)
}

fn drop_whitelisted(list: &mut List, whitelist: &Whitelist, log: &Log) -> bool {
    let rules = list.members_of(|_| true).map(|(group, net, _)| group.rule(*net));
    let dropped: Vec<Rule> = rules.filter(|rule| whitelist.conflict(rule).is_some()).collect();
    for rule in &dropped {
        list.remove(rule);
        log.warning(format_args!("removed {rule}: whitelisted"));
    }
    !dropped.is_empty()
}

/// Checks what the list of another rfw.conf, or of a file edited by hand, may exceed.
fn check_limits(list: &List) -> Result<(), String> {
    if let Some(family) = Family::ALL.iter().find(|f| list.count_rules(**f) > MAX_RULES) {
        return Err(format!(
            "there are more than {MAX_RULES} {family} rules; set ipset.path in rfw.conf to keep \
             them in sets"
        ));
    }
    let mut named: BTreeMap<String, Rule> = BTreeMap::new();
    for (set, group, members) in list.sets() {
        let Some(rule) = members.keys().next().map(|net| group.rule(*net)) else { continue };
        if let Some(other) = named.insert(set.to_string(), rule) {
            return Err(format!(
                "the set {set} would be that of {other} and that of {rule}; start rfw without \
                 ipset.path, delete either and all like it, and start it again"
            ));
        }
    }
    Ok(())
}

/// Checks that the kernel accepts rfw's rules, unless it holds some: inserts and deletes one in one
/// transaction, for an interface that no host has.
fn try_kernel<K: Kernel>(
    engine: &Engine<K>,
    family: Family,
    listing: &Listing,
) -> Result<(), String> {
    let sets = engine.list.sets.is_some();
    if listing.own().any(|(_, tagged)| !sets || tagged.rule.template().is_some()) {
        return Ok(());
    }
    let (in_iface, out_iface) = (Iface::parse("rfw0").unwrap_or(Iface::ANY), Iface::ANY);
    let (target, chain, side) = (Target::Accept, Chain::Input, Side::Source);
    let template = RuleTemplate { target, chain, in_iface, out_iface, side, tag: Tag::NONE };
    let try_rule = |rule| {
        let tagged = TaggedRule::new(rule, None);
        engine.write_rules(family, &[RuleEdit::Insert(1, tagged), RuleEdit::Delete(tagged)])
    };
    let reject = if family == Family::V4 { "ipt_REJECT" } else { "ip6t_REJECT" };
    let try_target = |target| {
        try_rule(KernelRule::plain(RuleTemplate { target, ..template }.rule(Net::any(family))))
    };
    if let Err(error) = try_target(Target::Reject) {
        try_target(Target::Accept).map_err(|error| not_accepted(&error, "xt_comment"))?;
        return Err(not_accepted(&error, reject));
    }
    if !sets {
        return Ok(());
    }
    let set = KernelRule::set(template, family);
    let name = set.to_string();
    let create = SetEdit::Create { name: &name, family, entries: 0, maxelem: 1 };
    let written = engine.write_set(create).and_then(|()| try_rule(set));
    let destroyed = written.and_then(|()| engine.write_set(SetEdit::Destroy(&name)));
    destroyed.map_err(|error| no_sets(&error))
}

/// Destroys those of rfw's sets that none of its rules uses. Their addresses are not enforced, so
/// they are not rules. If they cannot be listed, as without ipset, the next start does it.
fn destroy_leftovers<K: Kernel>(engine: &Engine<K>, log: &Log) {
    let Ok(headers) = engine.kernel.read_headers(engine.limit(0)) else { return };
    let used: HashSet<String> = engine.list.sets().map(|(rule, ..)| rule.to_string()).collect();
    for name in headers.into_iter().map(|header| header.name).filter(|name| !used.contains(name)) {
        match engine.write_set(SetEdit::Destroy(&name)) {
            Ok(()) => log.info(format_args!("destroyed the set {name}: no rule of rfw uses it")),
            Err(error) => {
                log.warning(format_args!(
                    "the set {name} remains, though rfw does not use it ({error}); if a foreign rule, \
                     or an rfw rule in the other variant of iptables, uses it, its addresses stay in \
                     effect there until a change to this set removes them; delete that rule \
                     (iptables-save | grep {name} shows it), and the next start destroys the set"
                ));
            }
        }
    }
}

fn not_accepted(error: &ToolError, module: &str) -> String {
    let advice = match error.is_transient() {
        true => "start rfw again".into(),
        false => format!(
            "the kernel must have the module {module} (with iptables-nft also nft_compat), and rfw \
             must run as root or with CAP_NET_ADMIN"
        ),
    };
    format!("the kernel did not accept rfw's rules ({error}); {advice}")
}

/// Why sets do not work.
fn no_sets(error: &ToolError) -> String {
    format!(
        "sets do not work here ({error}); rfw must run as root or with CAP_NET_ADMIN and \
         CAP_NET_RAW, and the kernel must have ip_set_hash_net and xt_set; or remove ipset.path \
         from rfw.conf, and rules for sets from the kernel"
    )
}
