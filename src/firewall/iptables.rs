//! rfw's rules as iptables writes and reads them, and the programs that do it.
//!
//! ```text
//! comment = "rfw" [ ":" UNIXSECONDS ] [ "@" tag ]     ; a rule, its expiry, its source
//!         / "rfw:guard"                ; a rule for the port of rfw's own server
//! ```
//!
//! A rule without such a comment, or of a form that rfw does not write, belongs to someone else
//! and stays untouched.

use super::ipset::set_name;
use super::process::{Program, Programs, ToolError};
use crate::rule::net::{Family, Net};
use crate::rule::tag::Tag;
use crate::rule::{Chain, Iface, Match, Rule, RuleTemplate, Side, Target};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The maximum number of rules in the built-in chains of one family, foreign ones included: an
/// endless listing must not exhaust memory.
const MAX_LISTED: usize = 300_000;
/// How many seconds the programs wait for the xtables lock.
const LOCK_WAIT: &str = "5";

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum RuleKind {
    Plain,
    /// It matches one TCP port only: that of rfw's own server.
    Guard(u16),
    /// It matches the addresses of a set only; its rule is for any address.
    Set(Side),
}

/// A rule as the kernel distinguishes it, apart from its expiry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct KernelRule {
    pub rule: Rule,
    pub kind: RuleKind,
}

impl KernelRule {
    pub fn plain(rule: Rule) -> KernelRule {
        KernelRule { rule, kind: RuleKind::Plain }
    }

    /// The rule for a template's set.
    pub fn set(template: RuleTemplate, family: Family) -> KernelRule {
        let kind = RuleKind::Set(template.side);
        KernelRule { rule: template.rule(Net::any(family)), kind }
    }

    pub fn is_guard(&self) -> bool {
        matches!(self.kind, RuleKind::Guard(_))
    }

    /// The template of a set's rule.
    pub fn template(&self) -> Option<RuleTemplate> {
        let RuleKind::Set(side) = self.kind else { return None };
        Some(self.rule.template_of(side))
    }
}

/// A path or what a guard rule does, for messages; the name of a set, for messages and commands.
impl fmt::Display for KernelRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind, self.template()) {
            (RuleKind::Guard(port), _) => {
                let (target, chain) = (self.rule.target.name(), self.rule.chain().name());
                write!(f, "guard rule for port {port} ({chain}, {target}")?;
                self.rule.addresses().try_for_each(|net| write!(f, " {net}"))?;
                f.write_str(")")
            }
            (_, Some(template)) => f.write_str(&set_name(&template, self.rule.family())),
            _ => self.rule.fmt(f),
        }
    }
}

type DeletionKey = (Target, Chain, Tag, [IpAddr; 2], RuleKind, Option<u64>);

/// A rule with rfw's comment, as the kernel holds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TaggedRule {
    pub rule: KernelRule,
    /// Unix seconds; only plain rules expire.
    pub expires: Option<u64>,
    /// Packets and bytes that it has matched, if they were read.
    pub counters: Option<(u64, u64)>,
}

impl TaggedRule {
    pub fn new(rule: KernelRule, expires: Option<u64>) -> TaggedRule {
        TaggedRule { rule, expires, counters: None }
    }

    /// What distinguishes two rules in the kernel.
    pub fn key(&self) -> (KernelRule, Option<u64>) {
        (self.rule, self.expires)
    }

    /// What distinguishes two rules for `-D`: ip6tables-nft compares addresses without the lengths of
    /// their prefixes, and 1.8.11 no interfaces.
    pub fn deletion_key(&self) -> DeletionKey {
        let KernelRule { rule, kind } = self.rule;
        let addresses = <[Net; 2]>::from(rule.sides()).map(|net| net.addr());
        (rule.target, rule.chain(), rule.tag, addresses, kind, self.expires)
    }
}

/// One change to a chain; `Display` writes it as an iptables command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RuleEdit {
    Delete(TaggedRule),
    /// It becomes the chain's rule of this number, counted from 1.
    Insert(usize, TaggedRule),
}

impl RuleEdit {
    pub fn tagged(&self) -> &TaggedRule {
        let (RuleEdit::Delete(tagged) | RuleEdit::Insert(_, tagged)) = self;
        tagged
    }
}

impl fmt::Display for RuleEdit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RuleEdit::Delete(tagged) => tagged.write(f, "-D", 1),
            RuleEdit::Insert(number, tagged) => {
                tagged.write(f, "-I", *number)?;
                match tagged.counters {
                    None | Some((0, 0)) => Ok(()),
                    Some((packets, bytes)) => write!(f, " -c {packets} {bytes}"),
                }
            }
        }
    }
}

impl TaggedRule {
    /// No word contains a space or a quote: only names, numbers and addresses get here.
    fn write(&self, f: &mut fmt::Formatter<'_>, verb: &str, number: usize) -> fmt::Result {
        let KernelRule { rule, kind } = self.rule;
        write!(f, "{verb} {}", rule.chain().name())?;
        if number > 1 {
            write!(f, " {number}")?;
        }
        let ((in_iface, out_iface), (source, destination)) = (rule.ifaces(), rule.sides());
        for (option, iface) in [("-i", in_iface), ("-o", out_iface)] {
            if iface != Iface::ANY {
                write!(f, " {option} {iface}")?;
            }
        }
        for (option, net) in [("-s", source), ("-d", destination)] {
            if !net.is_any() {
                write!(f, " {option} {net}")?;
            }
        }
        match kind {
            RuleKind::Plain => {}
            RuleKind::Guard(port) => {
                let option = if rule.chain() == Chain::Output { "--sport" } else { "--dport" };
                write!(f, " -p tcp -m tcp {option} {port}")?;
            }
            RuleKind::Set(side) => {
                let side = if side == Side::Source { "src" } else { "dst" };
                write!(f, " -m set --match-set {} {side}", self.rule)?;
            }
        }
        f.write_str(" -m comment --comment rfw")?;
        match (kind, self.expires) {
            (RuleKind::Guard(_), _) => f.write_str(":guard")?,
            (_, Some(second)) => write!(f, ":{second}")?,
            _ => {}
        }
        write!(f, "{} -j {}", rule.tag, rule.target.name())
    }
}

/// Reads a line of `iptables -v -S`; `None` if it is not a rule of a built-in chain. The order of
/// the options varies with the version.
pub fn parse_row(line: &str, family: Family) -> Option<(Chain, Option<TaggedRule>)> {
    let (chain, spec) = line.trim_end().strip_prefix("-A ")?.split_once(' ')?;
    let chain = Chain::ALL.into_iter().find(|known| known.name() == chain)?;
    let tagged = spec.contains("rfw").then(|| parse_tagged(chain, spec, family));
    Some((chain, tagged.flatten()))
}

/// The options of a rule in a listing, each with its value.
struct RuleOptions<'a> {
    /// Those that were not taken yet. The side of `--match-set` is one of its own.
    rest: Vec<(&'a str, &'a str)>,
    /// The values of `-m`.
    extensions: Vec<&'a str>,
    counters: Option<(u64, u64)>,
}

impl<'a> RuleOptions<'a> {
    fn parse(spec: &'a str) -> Option<RuleOptions<'a>> {
        let (rest, extensions) = (Vec::new(), Vec::new());
        let mut options = RuleOptions { rest, extensions, counters: None };
        let mut words = spec.split(' ');
        while let Some(option) = words.next() {
            let value = words.next()?;
            match (option, value) {
                ("-c", packets) => {
                    options.counters = Some((packets.parse().ok()?, words.next()?.parse().ok()?));
                }
                ("-m", name) => options.extensions.push(name),
                ("--match-set", name) => {
                    options.rest.extend([(option, name), ("side", words.next()?)]);
                }
                ("--reject-with", "icmp-port-unreachable" | "icmp6-port-unreachable") => {}
                _ => options.rest.push((option, value)),
            }
        }
        Some(options)
    }

    fn take(&mut self, name: &str) -> Option<&'a str> {
        let at = self.rest.iter().position(|(option, _)| *option == name)?;
        Some(self.rest.swap_remove(at).1)
    }

    /// The kind and the expiry of a rule, from its extensions and the rest of its comment. If the
    /// order of the extensions were different, a `-D` that rfw writes would not match the rule.
    fn kind(&mut self, comment: &str, chain: Chain) -> Option<(RuleKind, Option<u64>)> {
        match (self.extensions.as_slice(), comment) {
            (["comment"], "") => Some((RuleKind::Plain, None)),
            (["comment"], second) => {
                let second = second.strip_prefix(':')?;
                let expires: u64 = second.parse().ok().filter(|s: &u64| s.to_string() == second)?;
                Some((RuleKind::Plain, Some(expires)))
            }
            (["tcp", "comment"], ":guard") => {
                let port = self.take(if chain == Chain::Output { "--sport" } else { "--dport" })?;
                let port = port.parse().ok().filter(|_| self.take("-p") == Some("tcp"))?;
                Some((RuleKind::Guard(port), None))
            }
            (["set", "comment"], "") => match self.take("side")? {
                "src" => Some((RuleKind::Set(Side::Source), None)),
                "dst" => Some((RuleKind::Set(Side::Destination), None)),
                _ => None,
            },
            _ => None,
        }
    }

    fn matches(&mut self, chain: Chain, family: Family) -> Option<Match> {
        let same = |name: &str| {
            Iface::parse(name).filter(|iface| *iface != Iface::ANY && iface.to_string() == name)
        };
        let mut iface = |option| self.take(option).map_or(Some(Iface::ANY), same);
        let (in_iface, out_iface) = (iface("-i")?, iface("-o")?);
        let of_family = |text| Net::parse(text).filter(|net| net.family() == family);
        let mut net = |option| self.take(option).map_or(Some(Net::any(family)), of_family);
        let (source, destination) = (net("-s")?, net("-d")?);
        match (chain, (in_iface, source.is_any()), (out_iface, destination.is_any())) {
            (Chain::Forward, ..) => {
                Some(Match::Forward { in_iface, out_iface, source, destination })
            }
            (Chain::Input, _, (Iface::ANY, true)) => Some(Match::Input { iface: in_iface, source }),
            (Chain::Output, (Iface::ANY, true), _) => {
                Some(Match::Output { iface: out_iface, destination })
            }
            _ => None,
        }
    }
}

/// `None` if rfw did not write this rule: an option is left over, or it has another form.
fn parse_tagged(chain: Chain, spec: &str, family: Family) -> Option<TaggedRule> {
    let mut options = RuleOptions::parse(spec)?;
    let comment = options.take("--comment")?.trim_matches('"').strip_prefix("rfw")?;
    let (comment, tag) = Tag::split(comment)?;
    let (kind, expires) = options.kind(comment, chain)?;
    let target = options.take("-j")?;
    let target = Target::ALL.into_iter().find(|known| known.name() == target)?;
    let matches = options.matches(chain, family)?;
    let rule = KernelRule { rule: Rule { target, matches, tag }, kind };
    let is_own = match kind {
        RuleKind::Plain => rule.rule.is_wellformed(),
        RuleKind::Guard(_) => tag == Tag::NONE,
        // The name says everything that the rule says.
        RuleKind::Set(side) => {
            let never = [(Chain::Input, Side::Destination), (Chain::Output, Side::Source)];
            let is_named = options.take("--match-set")? == rule.to_string();
            is_named && !never.contains(&(chain, side)) && rule.rule.addresses().next().is_none()
        }
    };
    let counters = options.counters;
    (is_own && options.rest.is_empty()).then_some(TaggedRule { rule, expires, counters })
}

/// The programs of one family: `iptables`, and `iptables-restore` next to it.
#[derive(Clone)]
pub struct Iptables {
    pub family: Family,
    pub(super) iptables: Program,
    restore: Program,
}

/// The restore program next to an iptables: `/sbin/iptables-nft-restore` for `/sbin/iptables-nft`.
pub fn restore_path(iptables: &Path) -> PathBuf {
    let mut restore = iptables.as_os_str().to_owned();
    restore.push("-restore");
    restore.into()
}

impl Iptables {
    /// `iptables` is an absolute path.
    pub fn new(family: Family, iptables: PathBuf, programs: Arc<Programs>) -> Iptables {
        let restore = Program::new(restore_path(&iptables), programs.clone());
        Iptables { family, iptables: Program::new(iptables, programs), restore }
    }

    /// Commits edits in order, all or none: a single one as the command that its `Display`
    /// shows, several in one transaction.
    pub fn write(&self, edits: &[RuleEdit], limit: Duration) -> Result<(), ToolError> {
        match edits {
            [] => Ok(()),
            [edit] => {
                let line = edit.to_string();
                let args: Vec<&str> =
                    ["-w", LOCK_WAIT].into_iter().chain(line.split(' ')).collect();
                self.iptables.run(&args, limit, |_| Ok(()))
            }
            _ => {
                let args = ["--noflush", "-w", LOCK_WAIT];
                self.restore.run(&args, limit, |stdin| {
                    stdin.line("*filter")?;
                    edits.iter().try_for_each(|edit| stdin.line(edit))?;
                    stdin.line("COMMIT")
                })
            }
        }
    }

    /// Passes each rule of the built-in chains to `each`, with its line. iptables exits with 0
    /// even if it could not read everything, so a listing without the policy of each chain is an
    /// error; even one with all policies may lack rules.
    pub fn read(
        &self,
        limit: Duration,
        mut each: impl FnMut(Chain, Option<TaggedRule>, &str),
    ) -> Result<(), ToolError> {
        let args = ["-w", LOCK_WAIT, "-v", "-S"];
        let (mut policies, mut count) = (0_usize, 0_usize);
        self.iptables.read_lines(&args, limit, |line| {
            policies = policies.saturating_add(usize::from(line.starts_with("-P ")));
            if let Some((chain, rule)) = parse_row(line, self.family) {
                count = count.saturating_add(1);
                each(chain, rule, line.trim_end());
            }
            count < MAX_LISTED
        })?;
        let program = &self.iptables;
        if count < MAX_LISTED && policies >= Chain::ALL.len() {
            return Ok(());
        }
        Err(ToolError::Transient(match count {
            MAX_LISTED.. => format!("{program} lists {MAX_LISTED} rules or more."),
            _ => format!("{program} exited with 0 after an incomplete listing."),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::process::tests::make_program;
    use std::fs;

    fn read(line: &str) -> String {
        let family = if line.contains("::") { Family::V6 } else { Family::V4 };
        match parse_row(line, family) {
            None => "none".into(),
            Some((_, None)) => "foreign".into(),
            Some((_, Some(TaggedRule { rule, expires, counters }))) => {
                let tag = expires.map_or("rfw".into(), |second| format!("rfw:{second}"));
                format!("{rule} {tag} {:?}", counters.unwrap_or_default())
            }
        }
    }

    /// A listing that lacks a policy, or that does not end, is an error.
    #[test]
    fn listings_that_are_not_complete() {
        for (policies, rules, error) in [
            (3, 0, ""),
            (3, MAX_LISTED - 1, ""),
            (3, MAX_LISTED, "lists 300000 rules or more"),
            (2, MAX_LISTED - 1, "incomplete listing"),
            (0, 0, "incomplete listing"),
        ] {
            let script = format!(
                "yes -- '-P INPUT ACCEPT' | head -n {policies}\n\
                 yes -- '-A INPUT -j ACCEPT' | head -n {rules}\n"
            );
            let path = make_program("rfw-iptables", &script);
            let iptables = Iptables::new(Family::V4, path.clone(), Arc::default());
            let mut count = 0;
            let read = iptables.read(Duration::from_secs(60), |_, _, _| count += 1);
            let text = read.err().map_or(String::new(), |error| error.to_string());
            assert!(text.contains(error) && text.is_empty() == error.is_empty(), "{text}");
            assert_eq!(count, rules);
            fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn listings_of_several_versions() {
        let table = [
            // iptables-nft and iptables-legacy 1.8.9, with -v and without
            (
                r#"-A INPUT -s 1.1.1.1/32 -m comment --comment "rfw:17" -c 5 7 -j DROP"#,
                "/drop/input/any/1.1.1.1 rfw:17 (5, 7)",
            ),
            (
                "-A INPUT -s 2.2.2.0/24 -i ppp+ -m comment --comment rfw -c 0 0 -j REJECT --reject-with icmp-port-unreachable",
                "/reject/input/ppp+/2.2.2.0/24 rfw (0, 0)",
            ),
            (
                "-A OUTPUT -d 2001:db8::/64 -o eth0 -m comment --comment rfw -j REJECT --reject-with icmp6-port-unreachable\n",
                "/reject/output/eth0/2001:db8::/64 rfw (0, 0)",
            ),
            ("-A FORWARD -m comment --comment rfw -j DROP", "/drop/forward/any/0.0.0.0 rfw (0, 0)"),
            (
                "-A FORWARD -s 1.1.1.1/32 -d 2.2.2.2/32 -i a+ -o b1 -m comment --comment rfw -j ACCEPT",
                "/accept/forward/a+/1.1.1.1/b1/2.2.2.2 rfw (0, 0)",
            ),
            (
                r#"-A INPUT -s 9.9.9.9/32 -p tcp -m tcp --dport 7393 -m comment --comment "rfw:guard" -j ACCEPT"#,
                "guard rule for port 7393 (INPUT, ACCEPT 9.9.9.9) rfw (0, 0)",
            ),
            (
                r#"-A OUTPUT -p tcp -m tcp --sport 7393 -m comment --comment "rfw:guard" -j DROP"#,
                "guard rule for port 7393 (OUTPUT, DROP) rfw (0, 0)",
            ),
            (
                "-A INPUT -i a+ -m set --match-set rfw4:drop:in:a+ src -m comment --comment rfw -j DROP",
                "rfw4:drop:in:a+ rfw (0, 0)",
            ),
            (
                "-A FORWARD -o b1 -m set --match-set rfw6:accept:fwd:any:b1:dst dst -m comment --comment rfw -c 5 7 -j ACCEPT::",
                "foreign",
            ),
            // The order of versions before 1.4 and after 1.8.10
            (
                r#"-A INPUT -m comment --comment "rfw:17" -s 1.1.1.1/32 -j DROP -c 1 2"#,
                "/drop/input/any/1.1.1.1 rfw:17 (1, 2)",
            ),
            (
                "-A INPUT -i eth0 -s 1.1.1.1 -j DROP -m comment --comment rfw",
                "/drop/input/eth0/1.1.1.1 rfw (0, 0)",
            ),
        ];
        for (line, expected) in table {
            assert_eq!(read(line), expected, "{line}");
        }
    }

    #[test]
    fn rules_that_rfw_did_not_write_are_foreign() {
        let own = "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw -j DROP";
        assert_ne!(read(own), "foreign");
        let foreign = [
            "-A INPUT -s 1.1.1.1/32 -j DROP",
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw",
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw -j LOG",
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw -g DROP",
            "-A INPUT ! -s 1.1.1.1/32 -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -s 1.1.1.2/32 -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -d 2.2.2.2/32 -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -o eth0 -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.0.0.0/8 -m comment --comment rfw -j DROP",
            "-A INPUT -s 0.0.0.0/32 -m comment --comment rfw -j DROP",
            "-A INPUT -m comment --comment rfw -j DROP",
            r#"-A INPUT -p tcp -m comment --comment "rfw:guard" -m tcp --dport 99 -j ACCEPT"#,
            "-A INPUT -s 1.1.1.1/32 -m tcp -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -i any -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -i lo -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -p tcp -m tcp --dport 22 -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -p udp --dport 22 -m comment --comment rfw:guard -j DROP",
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw:guard -j DROP",
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw:017 -j DROP",
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw:-1 -j DROP",
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw2 -j DROP",
            r#"-A INPUT -s 1.1.1.1/32 -m comment --comment "rfw x" -j DROP"#,
            r#"-A INPUT -s 1.1.1.1/32 -m comment --comment "\"rfw\"" -j DROP"#,
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw -j REJECT --reject-with tcp-reset",
            r#"-A INPUT -j LOG --log-prefix "rfw -j DROP ""#,
            "-A INPUT -m set --match-set rfw4:drop:in:any src -m comment --comment rfw:17 -j DROP",
            "-A INPUT -m set --match-set rfw4:drop:in:any dst -m comment --comment rfw -j DROP",
            "-A INPUT -m set --match-set rfw4:drop:in:any src -m comment --comment rfw -j ACCEPT",
            "-A INPUT -m set --match-set rfw6:drop:in:any src -m comment --comment rfw -j DROP",
            "-A INPUT -m set ! --match-set rfw4:drop:in:any src -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -m set --match-set rfw4:drop:in:any src -m comment --comment rfw -j DROP",
            "-A INPUT -i b1 -m set --match-set rfw4:drop:in:any src -m comment --comment rfw -j DROP",
            "-A INPUT -m set --match-set hers src -m comment --comment rfw -j DROP",
        ];
        for line in foreign {
            assert_eq!(read(line), "foreign", "{line}");
        }
        let of_the_other_family = "-A FORWARD -s ::/0 -m comment --comment rfw -j DROP";
        assert_eq!(parse_row(of_the_other_family, Family::V4), Some((Chain::Forward, None)));
        for line in ["-P INPUT ACCEPT -c 0 0", "-N rfw", "-A rfw -j DROP", "# -A INPUT", ""] {
            assert_eq!(read(line), "none", "{line}");
        }
    }

    #[test]
    fn written_rules_are_read_back() {
        let rules = [
            (
                "/drop/input/eth0/1.2.3.4",
                "-D INPUT -i eth0 -s 1.2.3.4 -m comment --comment rfw -j DROP",
            ),
            (
                "/reject/output/any/2001:db8::/64",
                "-D OUTPUT -d 2001:db8::/64 -m comment --comment rfw -j REJECT",
            ),
            (
                "/accept/forward/a/1.2.3.4/b1/5.6.7.0/24",
                "-D FORWARD -i a+ -o b1 -s 1.2.3.4 -d 5.6.7.0/24 -m comment --comment rfw -j ACCEPT",
            ),
        ];
        for (path, line) in rules {
            let tagged = TaggedRule::new(KernelRule::plain(path.parse().unwrap()), None);
            assert_eq!(RuleEdit::Delete(tagged).to_string(), line);
            read_back(tagged);
        }
        for path in ["drop/input/any", "reject/output/a", "accept/forward/br-lan"] {
            let segments: Vec<&str> = path.split('/').collect();
            let template = RuleTemplate::parse(&segments).unwrap();
            for template in [template, RuleTemplate { side: Side::Destination, ..template }] {
                if template.chain != Chain::Input || template.side == Side::Source {
                    read_back(TaggedRule::new(KernelRule::set(template, Family::V4), None));
                    read_back(TaggedRule::new(KernelRule::set(template, Family::V6), None));
                }
            }
        }
        let mut tagged =
            TaggedRule::new(KernelRule::plain("/drop/input/any/1.2.3.4".parse().unwrap()), Some(9));
        tagged.counters = Some((5, 7));
        let line = "-I INPUT 3 -s 1.2.3.4 -m comment --comment rfw:9 -j DROP -c 5 7";
        assert_eq!(RuleEdit::Insert(3, tagged).to_string(), line);
    }

    fn read_back(tagged: TaggedRule) {
        let rule = tagged.rule.rule;
        let listed = RuleEdit::Insert(1, tagged).to_string().replace("-I ", "-A ");
        assert_eq!(
            parse_row(&listed, rule.family()),
            Some((rule.chain(), Some(tagged))),
            "{listed}"
        );
    }
}
