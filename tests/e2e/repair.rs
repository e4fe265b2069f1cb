//! Read, compare, rewrite: what others do to rfw's rules and sets, and listings that lie. Each defect
//! of rfw 0.3 that must not return has a test named after it; those of single changes are in
//! `commits`.

use crate::lab::*;
use crate::sets::never_unblocked;
use crate::tls;
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

/// Where rfw keeps addresses, and whether it has a state file.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    pub sets: bool,
    pub file: bool,
}

pub const FORMS: [Form; 4] = [
    Form { sets: false, file: false },
    Form { sets: false, file: true },
    Form { sets: true, file: false },
    Form { sets: true, file: true },
];

/// Runs `body` in each of these forms, with stand-ins for all programs and `lines` in rfw.conf. All
/// state is removed in between.
pub fn in_forms(lab: &Lab, forms: &[Form], lines: &str, body: impl Fn(&mut Rfw<'_>, Form)) {
    for (n, form) in FORMS
        .iter()
        .enumerate()
        .filter(|(_, f)| forms.iter().any(|g| (f.sets, f.file) == (g.sets, g.file)))
    {
        if std::env::var("RFW_FORM").is_ok_and(|f| f != n.to_string()) {
            continue;
        }
        println!("{form:?}"); // for the reader of a failure
        lab.stand_in("");
        let mut rfw = lab.start(&format!("local.server\n{lines}\n{}", of_form(*form)));
        body(&mut rfw, *form);
        drop(rfw);
        lab.reboot();
        sh("rm -f lab/state lab/rfw.log");
    }
}

/// The lines of rfw.conf for a form.
pub fn of_form(form: Form) -> String {
    let sets = if form.sets { "ipset.path = /run/lab/bin/ipset\n" } else { "" };
    let file = if form.file { "state.file = state\n" } else { "" };
    format!("{sets}{file}")
}

/// What the kernel enforces for rfw, sorted: "drop 1.1.1.1", with duplicates. An entry counts if its
/// set has a rule; of two addresses, the first is shown.
pub fn enforced(lab: &Lab) -> Vec<String> {
    let rules = lab.rules();
    let plain = rules.iter().filter(|rule| !rule.contains("--match-set")).map(|rule| {
        let words: Vec<_> = rule.split(' ').collect();
        let target = rule.split_once("-j ").unwrap().1.split(' ').next().unwrap().to_lowercase();
        format!("{target} {}", words[2].trim_end_matches("/32").trim_end_matches("/128"))
    });
    let entries = lab.entries().into_iter().filter_map(|(entry, _)| {
        let (set, address) = entry.split_once(' ').unwrap();
        let rule = format!("--match-set {set} ");
        let target = set.split(':').nth(1).unwrap_or("");
        rules.iter().any(|line| line.contains(&rule)).then(|| format!("{target} {address}"))
    });
    let mut all: Vec<_> = plain.chain(entries).collect();
    all.sort();
    all
}

/// The same according to GET /list.
pub fn listed() -> Vec<String> {
    let answer = ask("GET /list");
    assert_eq!(answer.status, 200, "{answer:?}");
    let rows = answer.body.split("{\"chain\":").skip(1).map(|row| {
        let row = Answer { status: 200, head: String::new(), body: row.into() };
        let ends = [row.field("source"), row.field("destination")];
        let address = ends.into_iter().find(|end| !["0.0.0.0/0", "::/0"].contains(end));
        format!("{} {}", row.field("target").to_lowercase(), address.unwrap_or("any"))
    });
    let mut rows: Vec<_> = rows.collect();
    rows.sort();
    rows
}

/// Calls that only read are counted, and run the script `lie-PROGRAM` first, once, if it exists.
pub const READS: &str = r#"case "$me $*" in *" -S"*|*list*|*save*)
    echo >> $lab/reads-$me
    /bin/mv $lab/lie-$me $lab/lie.$$ 2> /dev/null && . $lab/lie.$$
esac"#;

/// Waits until rfw has checked the kernel twice more; the stand-ins must be `READS`.
pub fn await_checks(lab: &Lab) {
    await_reads(lab, "iptables", 2);
}

fn await_reads(lab: &Lab, program: &str, count: usize) {
    let reads = || lab.read(&format!("reads-{program}")).len();
    let before = reads();
    for more in 1..=count {
        await_repair("rfw looks at the kernel", 15 + SLACK, || {
            !lab.others().is_empty() && reads() >= before + more
        });
    }
}

/// What a program prints instead of its listing, before it exits 0 as the real ones do.
const LIES: [&str; 4] = [
    "exit 0",
    "$real \"$@\" | /bin/grep -e '^-P' -e '^create' -e '^Name'; exit 0",
    "$real \"$@\" | /usr/bin/head -n -2; exit 0",
    "$real \"$@\" | /bin/sed '/^-A/p; /^add/p'; exit 0",
];

/// System calls of a listing that fail once, after most of which iptables or ipset exits 0.
const FAULTS: [&str; 5] = [
    "sendto:error=ENOBUFS:when=1",
    "sendto:error=ENOBUFS:when=3",
    "sendto:error=ENOBUFS:when=5",
    "recvmsg:error=EINTR:when=4",
    "write:error=ENOSPC:when=1",
];

/// With a state file, what is enforced does not depend on the listing: the simple lies suffice.
fn lies(form: Form) -> Vec<String> {
    let strace =
        |fault| format!("exec /usr/bin/strace -qq -o /dev/null -e inject={fault} $real \"$@\"");
    let faults = FAULTS.map(strace).into_iter().filter(|_| !form.file);
    LIES.map(String::from).into_iter().chain(faults).collect()
}

fn programs(form: Form) -> &'static [&'static str] {
    if form.sets { &["iptables", "ip6tables", "ipset"] } else { &["iptables", "ip6tables"] }
}

/// Addresses of both families, and where they are put: in all chains, and in several sets.
const LINES: &str = "1.1.1.1\n1.1.2.0/24\n2001:db8::1\n2001:db8:1::/64\n";
const PLACES: [&str; 3] = ["drop/input/any", "drop/output/eth0", "drop/forward/any"];

fn put_some() {
    for place in PLACES {
        assert_eq!(list(&format!("PUT /{place}"), LINES).sums(), "inserted 4");
    }
    for path in [
        "accept/input/any/2.2.2.2?expire=1d",
        "drop/forward/any/3.3.3.3/any/4.4.4.4?expire=1d",
        "drop/forward/any/3::3/any/4::4",
    ] {
        assert_eq!(ask(&format!("PUT /{path}")).brief(), "200 inserted");
    }
}

/// Checks that rfw itself knows them all.
fn assert_known(what: &str) {
    for place in PLACES {
        assert_eq!(list(&format!("PUT /{place}"), LINES).sums(), "exists 4", "{what}: {place}");
    }
}

/// The rules in kernel order, and the entries of the sets.
fn held(lab: &Lab) -> (Vec<String>, Vec<String>) {
    (lab.rules(), lab.entries().into_iter().map(|(entry, _)| entry).collect())
}

/// Checks that the log never reports a loss or a repair.
fn assert_quiet(lab: &Lab, what: &str) {
    let log = lab.read("rfw.log");
    let loud = ["removed ", "destroyed ", "restored ", "put back"];
    let line = log.lines().find(|line| loud.iter().any(|word| line.contains(word)));
    assert_eq!(line, None, "{what}");
}

#[test]
fn one_false_listing_at_start_emptied_or_doubled_the_rules() {
    if !has_strace("repair::one_false_listing_at_start_emptied_or_doubled_the_rules") {
        return;
    }
    both(|lab| {
        in_forms(lab, &FORMS, "", |rfw, form| {
            put_some();
            let before = held(lab);
            lab.stand_in(READS);
            for program in programs(form) {
                for lie in lies(form) {
                    let what = format!("{form:?} {program} {lie}");
                    rfw.kill();
                    lab.clear_log();
                    lab.write_data(&format!("lie-{program}"), &lie);
                    // It may refuse to start, but then it must not change anything.
                    if let Some(status) = rfw.try_restart(10 + SLACK) {
                        assert_eq!((status, held(lab)), (1, before.clone()), "{what}");
                        rfw.restart();
                    }
                    assert_eq!(held(lab), before, "{what}");
                    sh(&format!("rm -f lab/lie-{program}"));
                    assert_known(&what);
                    assert_eq!(held(lab), before, "{what}");
                    assert_quiet(lab, &what);
                }
            }
            await_checks(lab);
            assert_eq!(held(lab), before);
            assert_eq!(listed(), enforced(lab));
        });
    });
}

/// A start that cannot read anything changes nothing.
#[test]
fn false_listings_at_start_that_go_on_emptied_the_rules() {
    both(|lab| {
        in_forms(lab, &FORMS, "", |rfw, form| {
            put_some();
            let before = held(lab);
            for program in programs(form) {
                lab.stand_in(&format!("case \"$me $*\" in {program}*' -S'*|{program}*list*|{program}*save*) exit 0;; esac"));
                rfw.kill();
                lab.clear_log();
                let ended = rfw.try_restart(30 + SLACK);
                assert!([None, Some(1)].contains(&ended), "{program}: {ended:?}");
                // Without a file, rfw may start if it does not see the sets.
                assert!(ended.is_some() || *program == "ipset", "{program}: it started");
                assert_eq!(held(lab), before, "{program}");
                assert_quiet(lab, program);
                lab.stand_in("");
                rfw.restart();
                assert_eq!(held(lab), before, "{program}");
            }
        });
    });
}

#[test]
fn one_false_listing_while_rfw_ran_emptied_or_doubled_the_rules() {
    if has_strace("repair::one_false_listing_while_rfw_ran_emptied_or_doubled_the_rules") {
        both(|lab| one_false_listing(lab, &FORMS[..2]));
    }
}

#[test]
fn one_false_listing_while_rfw_ran_emptied_the_sets_or_took_their_rules() {
    if has_strace("repair::one_false_listing_while_rfw_ran_emptied_the_sets_or_took_their_rules") {
        both(|lab| one_false_listing(lab, &FORMS[2..]));
    }
}

fn one_false_listing(lab: &Lab, forms: &[Form]) {
    in_forms(lab, forms, "", |_, form| {
        put_some();
        let before = held(lab);
        lab.stand_in(READS);
        // A lie does the most harm in the second listing, after a real loss. With a file, it is the
        // same list in memory.
        let first = [(LIES[0].to_string(), false)];
        let second = lies(form).into_iter().map(|lie| (lie, true));
        let rows = first.into_iter().chain(second);
        for (lie, second) in rows.take(if form.file { 2 } else { usize::MAX }) {
            let what = format!("{form:?} second: {second} {lie}");
            let files = programs(form).iter().map(|program| format!("lie-{program}"));
            let files: Vec<_> = files.collect();
            for file in &files {
                lab.write_data(&format!("next-{file}"), &lie);
                // The first listing is the truth, and shows that something is missing.
                let next = format!("/bin/mv $lab/next-{file} $lab/{file}");
                lab.write_data(file, if second { &next } else { &lie });
            }
            if second {
                lab.iptables("-D INPUT 2");
                lab.ip6tables("-D INPUT 1");
                sh("ipset -quiet flush rfw4:drop:in:any || true");
            }
            let have_lied = || !files.iter().any(|file| lab.dir.join(file).exists());
            await_true(&format!("all have lied: {what}"), 15 + SLACK, have_lied);
            await_checks(lab);
            await_repair(&format!("as before: {what}"), 3 + SLACK, || {
                let is = held(lab);
                let twice = is.0.iter().enumerate().find(|(n, rule)| is.0[..*n].contains(rule));
                assert_eq!(twice, None, "{what}");
                is == before
            });
            if !second {
                assert_quiet(lab, &what);
            }
            lab.clear_log();
        }
        assert_eq!(listed(), enforced(lab));
    });
}

#[test]
fn false_listings_that_go_on_are_answered_with_an_error() {
    both(|lab| {
        in_forms(lab, &FORMS, "", |_, form| {
            put_some();
            let (before, list) = (held(lab), listed());
            for program in programs(form).iter().filter(|program| **program != "ipset") {
                lab.stand_in(&format!(
                    "{READS}\ncase \"$me $*\" in {program}*' -S'*) exit 0;; esac"
                ));
                let answer = ask("GET /list");
                assert!(answer.status >= 500, "{program}: {answer:?}");
                for request in ["DELETE /drop/input/any/9.9.9.9", "PUT /drop/input/any/1.1.1.1"] {
                    let answer = ask(request);
                    assert!(answer.status == 200 || answer.status >= 500, "{answer:?}");
                }
                await_checks(lab);
                assert_eq!(held(lab), before, "{program}");
                lab.stand_in("");
                await_true("GET /list works", SLACK, || ask("GET /list").status == 200);
                assert_eq!((listed(), held(lab)), (list.clone(), before.clone()), "{program}");
                assert_known(program);
                assert_eq!(held(lab), before, "{program}");
            }
        });
    });
}

#[test]
fn one_empty_listing_of_the_sets_removed_all_their_rules() {
    both(|lab| {
        in_forms(lab, &FORMS[2..], "", |_, _| {
            put_some();
            let before = held(lab);
            // Once, and for the duration of three checks, which read five times each until they fail.
            let lies = [
                ("[ -e $lab/lied ] || { /bin/touch $lab/lied; exit 0; }", "iptables", 2),
                ("exit 0", "ipset", 15),
            ];
            for (once, program, reads) in lies {
                lab.stand_in(&format!(
                    "{READS}\ncase \"$me $*\" in ipset*list*|ipset*save*) {once};; esac"
                ));
                await_reads(lab, program, reads);
                assert_eq!(held(lab), before, "{once}");
                lab.stand_in(READS);
                await_checks(lab);
                assert_eq!(held(lab), before, "{once}");
                assert_quiet(lab, once);
                sh("rm -f lab/lied");
            }
            assert_eq!(listed(), enforced(lab));
        });
    });
}

#[test]
fn a_listing_that_repeated_rows_had_rules_listed_twice_or_deleted() {
    both(|lab| {
        in_forms(lab, &[FORMS[0], FORMS[2]], "", |_, form| {
            put_some();
            let (before, list) = (held(lab), listed());
            lab.stand_in(READS);
            for lie in [
                "$real \"$@\" | /bin/sed '/^-A/p; /^add/p'; exit 0",
                // The first rows once more at the end.
                "$real \"$@\" > $lab/all; /bin/cat $lab/all; /bin/grep -m 3 -e ^-A -e ^add $lab/all; exit 0",
            ] {
                for program in programs(form) {
                    lab.write_data(&format!("lie-{program}"), lie);
                    // The entries of a set are sent in the order of ipset.
                    for _ in 0..if *program == "ipset" { 0 } else { 2 } {
                        assert_eq!(listed(), list, "{program} {lie}");
                    }
                    await_checks(lab);
                    assert_eq!(held(lab), before, "{program} {lie}");
                }
            }
            assert_quiet(lab, "rows that repeat");
        });
    });
}

/// The same rules, each at the end of one listing or the other, while four clients change others.
#[test]
fn get_list_repeated_rows_while_others_were_changed() {
    both(|lab| {
        let count = lab.seed(3000, "rfw");
        let _rfw = lab.start("local.server");
        let done = std::sync::atomic::AtomicBool::new(false);
        let order = std::sync::atomic::Ordering::SeqCst;
        std::thread::scope(|scope| {
            for client in 0..4 {
                let done = &done;
                scope.spawn(move || {
                    let mut conn = Conn::open();
                    for n in (0..200).cycle().take_while(|_| !done.load(order)) {
                        let path = format!("/drop/input/any/11.0.{client}.{n}");
                        assert_eq!(conn.ask(&format!("PUT {path}")).brief(), "200 inserted");
                        assert_eq!(conn.ask(&format!("DELETE {path}")).brief(), "200 deleted");
                    }
                });
            }
            let wrong = (0..60).find_map(|_| {
                let seeded: Vec<_> =
                    listed().into_iter().filter(|row| row.starts_with("drop 10.")).collect();
                let twice = seeded.windows(2).find(|two| two[0] == two[1]);
                (twice.is_some() || seeded.len() != count)
                    .then(|| (seeded.len(), twice.map(<[_]>::to_vec)))
            });
            done.store(true, order);
            assert_eq!(wrong, None);
        });
        assert_eq!(lab.rules().len(), count);
    });
}

#[test]
fn a_put_after_a_flush_answered_exists_and_the_kernel_held_nothing() {
    both(|lab| {
        modes(lab, "", |_, sets| {
            let paths = ["/drop/input/any/1.1.1.1", "/drop/input/any/2001:db8::1"];
            let puts = paths.map(|path| format!("PUT {path}"));
            puts.iter().for_each(|put| assert_eq!(ask(put).brief(), "200 inserted"));
            ask("PUT /drop/output/any/3.3.3.3");
            let all = enforced(lab);
            let flush = || drop((lab.iptables("-F"), lab.ip6tables("-F")));
            let losses: [(&str, bool, &dyn Fn()); 6] = [
                ("flush", false, &flush),
                ("flush INPUT", false, &|| {
                    drop((lab.iptables("-F INPUT"), lab.ip6tables("-F INPUT")))
                }),
                ("-D", false, &|| drop((lab.iptables("-D INPUT 1"), lab.ip6tables("-D INPUT 1")))),
                ("flush the sets", true, &|| drop(lab.ipset("flush"))),
                ("del", true, &|| {
                    lab.ipset("-exist del rfw4:drop:in:any 1.1.1.1");
                    lab.ipset("-exist del rfw6:drop:in:any 2001:db8::1");
                }),
                ("destroy", true, &|| destroy_all(lab)),
            ];
            for (what, only_sets, loss) in losses {
                for (put, address) in puts.iter().zip(["drop 1.1.1.1", "drop 2001:db8::1"]) {
                    if only_sets && !sets {
                        continue;
                    }
                    loss();
                    let answer = ask(put);
                    let there = enforced(lab).contains(&address.to_string());
                    assert!(answer.status == 200 && there, "{what}: {put}: {answer:?}");
                    await_repair("all is there again", 5 + SLACK, || enforced(lab) == all);
                }
            }
        });
        // After a long check, the next one comes much later.
        let count = lab.seed(5000, "rfw");
        let _rfw = lab.start("local.server");
        for n in [7, 77, 177] {
            lab.iptables("-F");
            let answer = ask(&format!("PUT /drop/input/any/10.0.{n}.1"));
            let there = enforced(lab).contains(&format!("drop 10.0.{n}.1"));
            assert!(answer.status == 200 && there, "{answer:?}");
            await_true("all is there again", 10 + SLACK, || lab.rules().len() == count);
        }
    });
}

/// Programs that wait for a busy machine use no processor time, so the next check comes soon.
#[test]
fn a_slow_check_delayed_the_next_one() {
    both(|lab| {
        lab.stand_in(&format!("{READS}\ncase \"$*\" in *\" -S\") /bin/sleep 1;; esac"));
        let _rfw = lab.start("local.server");
        ask("PUT /drop/input/any/1.1.1.1");
        for _ in 0..2 {
            await_checks(lab);
            lab.iptables("-F");
            await_true("it is blocked again", 12 + SLACK, || lab.rules().len() == 1);
        }
    });
}

/// Flushes both families until no rule of rfw prevents destroying the sets.
fn destroy_all(lab: &Lab) {
    let [four, six] = ["iptables", "ip6tables"].map(|family| lab.real(family));
    sh(&format!("until {four} -w -F && {six} -w -F && ipset destroy 2> /dev/null; do :; done"));
}

/// Rules that others (a person, Docker, Tailscale) insert before all rules or between rfw's.
const FOREIGN: [(&str, &str, &str); 7] = [
    ("iptables", "-I INPUT", "-j ACCEPT"),
    ("iptables", "-I INPUT 2", "-s 9.9.9.9/32 -j ACCEPT"),
    ("iptables", "-I FORWARD", "-j DOCKER-USER"),
    ("iptables", "-I FORWARD", "-o docker0 -j ACCEPT"),
    ("iptables", "-I OUTPUT", "-j ts-output"),
    ("ip6tables", "-I INPUT", "-j ACCEPT"),
    ("ip6tables", "-I FORWARD", "-j DOCKER-USER"),
];

fn foreign_chains(lab: &Lab) {
    for chain in ["DOCKER-USER", "ts-output"] {
        for words in [format!("-N {chain}"), format!("-A {chain} -j RETURN")] {
            lab.iptables(&words);
            lab.ip6tables(&words);
        }
    }
}

/// Not while rfw runs: it would restore a rule before its set is destroyed.
fn forget_foreign_chains(lab: &Lab, rfw: &mut Rfw<'_>) {
    rfw.kill();
    lab.reboot();
    lab.iptables("-X");
    lab.ip6tables("-X");
}

/// A counter of GET /metrics; 0 if it does not exist.
pub fn metric(name: &str) -> usize {
    let text = ask("GET /metrics").body;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(0, |value| value.parse().unwrap())
}

#[test]
fn foreign_rules_in_front_let_blocked_addresses_through() {
    both(|lab| {
        sh(STRANGERS);
        in_forms(lab, &FORMS, "", |rfw, form| {
            put_some();
            ask("PUT /drop/input/any/10.9.9.9");
            ask("PUT /drop/input/any/fd09::9");
            foreign_chains(lab);
            for at in ["10.9.9.9:0", "[fd09::9]:0"] {
                let socket = UdpSocket::bind(at).unwrap();
                (0..3)
                    .for_each(|_| drop(socket.send_to(b"12345678", socket.local_addr().unwrap())));
            }
            let (rules, counted) = (held(lab), lab.counted());
            assert!(counted.iter().any(|line| line.contains(" -c 3 ")), "{counted:?}");
            for (family, verb, rule) in FOREIGN {
                let what = format!("{form:?} {family} {verb} {rule}");
                let before = metric("rfw_overtaken_total");
                lab.clear_log();
                sh(&format!("{} -w {verb} {rule}", lab.real(family)));
                let others = lab.others();
                await_repair(&format!("rfw's come first: {what}"), 3 + SLACK, || lab.is_first());
                assert_eq!((held(lab), lab.others()), (rules.clone(), others), "{what}");
                assert_eq!(lab.counted(), counted, "{what}");
                if verb.ends_with('2') {
                    continue; // nothing is in front
                }
                let shown = |line: &str| line.contains(" WARNING ") && line.contains(rule);
                let log = || lab.read("rfw.log");
                await_true(&format!("a warning: {what}"), SLACK, || log().lines().any(shown));
                assert!(metric("rfw_overtaken_total") > before, "{what}");
            }
            forget_foreign_chains(lab, rfw);
        });
    });
}

/// rfw's rules are in force at every moment while they move.
#[test]
fn rules_that_move_to_the_front_block_meanwhile() {
    both(|lab| {
        sh(STRANGERS);
        modes(lab, "", |_, _| {
            let many: String = (0..50).map(|n| format!("10.9.9.{n}\nfd09::{n}\n")).collect();
            list("PUT /drop/input/any", &many);
            never_unblocked(|| {
                for n in 0..3 {
                    lab.iptables(&format!("-I INPUT -s 9.9.9.{n} -j ACCEPT"));
                    lab.ip6tables(&format!("-I INPUT -s 9::{n} -j ACCEPT"));
                    await_repair("rfw's come first", 3 + SLACK, || lab.is_first());
                }
            });
        });
    });
}

#[test]
fn a_repeated_put_or_a_restart_left_foreign_rules_in_front() {
    both(|lab| {
        tls::keys(lab);
        in_forms(lab, &FORMS, tls::CONF, |rfw, form| {
            put_some();
            foreign_chains(lab);
            // A rule that was put again may have moved to the front.
            let sorted = |mut held: (Vec<String>, Vec<String>)| {
                held.0.sort();
                held
            };
            let rules = sorted(held(lab));
            for path in ["drop/input/any/2001:db8::1", "drop/input/any/1.1.1.1"] {
                lab.iptables("-I INPUT -j ACCEPT");
                lab.ip6tables("-I INPUT -j ACCEPT");
                let answer = ask(&format!("PUT /{path}"));
                let listing = if path.contains(':') {
                    lab.ip6tables("-S INPUT")
                } else {
                    lab.iptables("-S INPUT")
                };
                let first = listing.lines().nth(1) != Some("-A INPUT -j ACCEPT");
                assert!(answer.status == 200 && first, "{path}: {answer:?}\n{listing}");
                await_repair("the other family too", 3 + SLACK, || lab.is_first());
            }
            // A new address is blocked, too, in an old set and in a new one.
            for path in ["drop/input/any/5.5.5.5", "drop/input/eth9/5.5.5.5"] {
                lab.iptables("-I INPUT -j ACCEPT");
                assert_eq!(ask(&format!("PUT /{path}")).brief(), "200 inserted");
                let listing = lab.iptables("-S INPUT");
                let first = listing.lines().nth(1) != Some("-A INPUT -j ACCEPT");
                assert!(first, "{form:?} {path}: {listing}");
                await_repair("rfw's come first", 3 + SLACK, || lab.is_first());
                assert_eq!(ask(&format!("DELETE /{path}")).brief(), "200 deleted");
            }
            rfw.kill();
            for (family, verb, rule) in FOREIGN {
                sh(&format!("{} -w {verb} {rule}", lab.real(family)));
            }
            let others = lab.others();
            rfw.restart();
            assert!(lab.is_first(), "{form:?}: {:#?}", lab.iptables("-S"));
            assert_eq!(lab.others(), others, "{form:?}");
            await_repair("nothing is lost", 3 + SLACK, || sorted(held(lab)) == rules);
            forget_foreign_chains(lab, rfw);
        });
    });
}

/// Two programs that both want to be first would fight forever.
#[test]
fn rfw_moves_to_the_front_ten_times_and_then_once_a_minute() {
    legacy(|lab| {
        let _rfw = lab.start("local.server");
        ask("PUT /drop/input/any/1.1.1.1");
        let overtake = |n| drop(lab.iptables(&format!("-I INPUT -s 9.9.9.{n} -j ACCEPT")));
        let mut moves = now();
        for n in 0..10 {
            moves = now();
            overtake(n);
            await_repair(&format!("rfw's come first, {n}"), 3 + SLACK, || lab.is_first());
        }
        assert_eq!(metric("rfw_overtaken_total"), 10);
        let last = now();
        overtake(10);
        await_true("rfw waits", 60, || {
            assert!(!lab.is_first(), "after {} s", now() - last);
            now() >= last + 30
        });
        await_repair("rfw's come first after all", 32 + SLACK, || lab.is_first());
        assert!(now() >= moves + 60, "after {} s", now() - moves);
    });
}

#[test]
fn a_foreign_rule_that_used_a_set_kept_rfw_from_starting() {
    both(|lab| {
        let set = "rfw4:drop:in:any";
        let exists = || lab.ipset("list -n").lines().any(|name| name == set);
        for form in [FORMS[2], FORMS[3]] {
            lab.stand_in("");
            let sets = format!("local.server\n{}", of_form(form));
            let mut rfw = lab.start(&sets);
            transcript(&[
                ("PUT /drop/input/any/1.1.1.1", "200 inserted"),
                ("PUT /accept/input/any/2.2.2.2", "200 inserted"),
            ]);
            lab.iptables(&format!("-A OUTPUT -m set --match-set {set} dst -j DROP"));
            let (others, all) = (lab.others(), enforced(lab));
            let fewer = vec!["accept 2.2.2.2".to_string()];
            // A command, whether rfw uses sets afterwards, and what is enforced after a restart.
            let steps: [(&str, bool, &[String]); 6] = [
                ("GET /", true, &all),
                ("DELETE /drop/input/any/1.1.1.1", true, &fewer),
                ("PUT /drop/input/any/1.1.1.1", true, &all),
                ("GET /", false, &all),
                ("GET /", false, &all),
                ("GET /", true, &all),
            ];
            for (request, has_sets, want) in steps {
                let what = format!("{form:?} {request} {has_sets}");
                assert_eq!(ask(request).status, 200, "{what}");
                lab.clear_log();
                lab.configure(if has_sets { &sets } else { sets.split("ipset").next().unwrap() });
                if !has_sets && form.file {
                    lab.configure("local.server\nstate.file = state");
                }
                rfw.restart();
                await_repair(&what, 3 + SLACK, || enforced(lab) == want);
                assert_eq!(lab.others(), others, "{what}");
                let log = lab.log();
                let destroyed = |line: &str| line.contains(&format!("destroyed the set {set}:"));
                assert!(exists() && !log.lines().any(destroyed), "{what}\n{log}");
                let is_warning = |line: &str| line.contains(" WARNING ") && line.contains(set);
                assert!(has_sets || log.lines().any(is_warning), "{what}\n{log}");
            }
            drop(rfw);
            lab.reboot();
            sh("rm -f lab/state");
        }
    });
}

/// The entries of the sets, like `Lab::kept`; but while others change them, an address may occur
/// twice.
fn in_sets(lab: &Lab) -> BTreeMap<String, Option<u64>> {
    let of_entry = |(entry, left): (String, u64)| {
        (entry.split_once(' ').unwrap().1.to_string(), (left > 0).then(|| now() + left))
    };
    lab.entries().into_iter().map(of_entry).collect()
}

/// Whether addresses and expiries are the same, as precisely as a set stores them.
fn near(a: &BTreeMap<String, Option<u64>>, b: &BTreeMap<String, Option<u64>>) -> bool {
    let same = |(a, b): (&Option<u64>, &Option<u64>)| {
        a.is_some() == b.is_some() && a.unwrap_or(0).abs_diff(b.unwrap_or(0)) <= 3
    };
    a.keys().eq(b.keys()) && a.values().zip(b.values()).all(same)
}

#[test]
fn sets_that_others_flushed_or_destroyed_were_lost() {
    both(|lab| {
        in_forms(lab, &FORMS[2..], "", |_, _| {
            assert_eq!(list("PUT /drop/input/any", "1.1.1.1\n1.1.2.0/24\n").sums(), "inserted 2");
            assert_eq!(
                list("PUT /drop/input/any?expire=1h", "3.3.3.3\n5::\n").sums(),
                "inserted 2"
            );
            assert_eq!(list("PUT /reject/output/any", "4.4.4.4\n").sums(), "inserted 1");
            let (kept, rules, rows) = (lab.kept(), lab.rules(), listed());
            let own = "rfw4:drop:in:any";
            let flush = format!("until {} -w -F", lab.real("iptables"));
            for loss in [
                format!("ipset flush {own}"),
                "ipset flush".into(),
                format!("ipset del {own} 1.1.1.1"),
                format!("ipset -exist add {own} 1.1.1.1 timeout 1"),
                format!("{flush} && ipset destroy {own}; do :; done"),
                format!(
                    "ipset create hers hash:net timeout 0 counters; ipset swap {own} hers; ipset destroy hers"
                ),
            ] {
                lab.clear_log();
                sh(&loss);
                let back = || near(&in_sets(lab), &kept) && lab.rules() == rules;
                await_repair(&format!("all is there again: {loss}"), 4 + SLACK, back);
                assert_eq!(listed(), rows, "{loss}");
                let warned = || lab.read("rfw.log").contains(" WARNING ");
                await_true(&format!("a warning: {loss}"), SLACK, warned);
            }
            let delete = list("DELETE /drop/input/any", "1.1.1.1\n1.1.2.0/24\n3.3.3.3\n5::\n");
            assert_eq!(delete.sums(), "deleted 4");
        });
    });
}

#[test]
fn two_sets_of_one_family_destroyed_at_once_were_the_end() {
    both(|lab| {
        tls::keys(lab);
        in_forms(lab, &FORMS[2..], tls::CONF, |_, _| {
            put_some();
            assert_eq!(list("PUT /reject/input/eth1", "6.6.6.6\n6::\n").sums(), "inserted 2");
            let (rules, guards, all, rows) = (held(lab), lab.guards(), enforced(lab), listed());
            assert!(rules.0.len() >= 10 && guards.len() >= 6, "{rules:?} {guards:?}");
            for n in 0..3 {
                destroy_all(lab);
                if n == 1 {
                    // Meanwhile, too, it is a change like any other.
                    assert_eq!(ask("PUT /drop/input/eth7/7.7.7.7").brief(), "200 inserted");
                    assert_eq!(ask("DELETE /drop/input/eth7/7.7.7.7").brief(), "200 deleted");
                }
                let back = || enforced(lab) == all && lab.guards() == guards;
                await_repair(&format!("all is there again, {n}"), 5 + SLACK, back);
                assert_eq!(listed(), rows);
                let counted = || {
                    let text = ask("GET /metrics").body;
                    let rules = text.lines().filter(|line| line.starts_with("rfw_rules{"));
                    let count = |line: &str| line.rsplit(' ').next().unwrap().parse::<usize>();
                    rules.map(|line| count(line).unwrap()).sum::<usize>() == all.len()
                };
                await_true("all are counted", 3 + SLACK, counted);
            }
            assert_eq!(ask("DELETE /accept/input/any/2.2.2.2").brief(), "200 deleted");
        });
    });
}

/// Both addresses are this host's own and not whitelisted: only the guards block them.
#[test]
fn an_accept_rule_of_rfws_opened_its_own_port() {
    both(|lab| {
        sh("ip addr add 10.9.9.9/32 dev lo; ip addr add fd09::9/128 dev lo nodad");
        tls::keys(lab);
        let is_open = |address: &str| {
            let address: SocketAddr = address.parse().unwrap();
            TcpStream::connect_timeout(&address, Duration::from_millis(300)).is_ok()
        };
        let closed = |when: &str| {
            for chain in ["INPUT", "OUTPUT"] {
                for listing in
                    [lab.iptables(&format!("-S {chain}")), lab.ip6tables(&format!("-S {chain}"))]
                {
                    let others = listing.lines().skip(1).map(|line| !line.contains("rfw:guard"));
                    assert!(others.is_sorted(), "{when}: a rule precedes a guard\n{listing}");
                }
            }
            assert!(!is_open("10.9.9.9:7393") && !is_open("[fd09::9]:7393"), "{when}");
            assert!(is_open("127.0.0.1:7393") && is_open("[::1]:7393"), "{when}");
        };
        in_forms(lab, &FORMS, tls::CONF, |rfw, form| {
            closed("without rules");
            for chain in ["input", "output"] {
                let lines = "10.9.9.9\nfd09::9\n8.8.8.8\n";
                assert_eq!(list(&format!("PUT /accept/{chain}/any"), lines).sums(), "inserted 3");
                ask(&format!("PUT /accept/{chain}/lo/10.9.9.9"));
                ask(&format!("PUT /accept/{chain}/lo/fd09::9?expire=1h"));
            }
            closed("after PUT");
            let rules = lab.rules().len() + lab.guards().len();
            lab.iptables("-F");
            lab.ip6tables("-F");
            let back = || lab.rules().len() + lab.guards().len() == rules;
            await_repair("all is there again", 4 + SLACK, back);
            closed("after a flush");
            rfw.restart();
            closed("after a restart");
            rfw.kill();
            lab.iptables("-D INPUT 1");
            if form.file {
                lab.reboot();
            }
            rfw.restart();
            closed("after a restart with a guard missing");
        });
    });
}
