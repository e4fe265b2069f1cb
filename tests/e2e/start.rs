//! What rfw finds and reports at start: rules that others left in the kernel, and an iptables that
//! cannot do what rfw needs.

use crate::lab::*;
use std::fs;

/// The rules that rfw 0.2.2 left with the lab's white.list and port 7399: its guards, and those for
/// the requests `drop/input/eth0/1.2.3.4`, `drop/input/any/7.7.7.77/24`,
/// `accept/input/any/7.7.7.7`, `accept/output/any/9.9.9.0/24`,
/// `reject/forward/ppp/1.2.3.0/24/eth0/5.5.5.5`, `drop/forward/any/6.6.6.6`,
/// `drop/forward/any/0.0.0.0/any/6.6.6.7`.
const OLD: [&str; 11] = [
    "INPUT -p tcp --dport 7399 -j DROP",
    "OUTPUT -p tcp --sport 7399 -j DROP",
    "INPUT -p tcp --dport 7399 -s 192.0.2.1 -j ACCEPT",
    "OUTPUT -p tcp --sport 7399 -d 192.0.2.1 -j ACCEPT",
    "INPUT -s 1.2.3.4 -j DROP",
    "INPUT -s 7.7.7.77/24 -j DROP",
    "INPUT -s 7.7.7.7 -j ACCEPT",
    "OUTPUT -d 9.9.9.0/24 -j ACCEPT",
    "FORWARD -d 5.5.5.5 -s 1.2.3.0/24 -j REJECT",
    "FORWARD -s 6.6.6.6 -j DROP",
    "FORWARD -s 0.0.0.0 -d 6.6.6.7 -j DROP",
];

/// The administrator's own rules, in a different form.
const OTHERS: [&str; 5] = [
    "FORWARD -j DROP",
    "INPUT -p tcp --dport 22 -j ACCEPT",
    "INPUT -s 9.9.9.9 -i lo -j DROP",
    "INPUT -s 9.9.9.9 -m comment --comment mine -j DROP",
    "OUTPUT -d 9.9.9.9 -p tcp --dport 7399 -j ACCEPT",
];

fn warnings(lab: &Lab, word: &str) -> Vec<String> {
    let log = lab.log();
    let lines = log.lines().filter(|line| line.contains(" WARNING ") && line.contains(word));
    lines.map(String::from).collect()
}

/// Runs commands as the administrator types them, where `iptables` is the lab's variant.
fn type_in(lab: &Lab, commands: &str) {
    sh(&format!(
        "mkdir -p lab/path; ln -sf {} lab/path/iptables; ln -sf {} lab/path/iptables-restore
         ln -sf {} lab/path/rfwc
         cd lab; PATH=/run/lab/path:$PATH; {commands}",
        lab.real("iptables"),
        lab.real("iptables-restore"),
        env!("CARGO_BIN_EXE_rfw"),
    ));
}

#[test]
fn rules_of_0_2_2() {
    both(|lab| {
        OTHERS.iter().for_each(|rule| drop(lab.iptables(&format!("-A {rule}"))));
        let others = lab.others();
        OLD.iter().for_each(|rule| drop(lab.iptables(&format!("-I {rule}"))));
        let mut rfw = lab.start("local.server");
        await_report();
        let found = warnings(lab, "0.2.2");
        assert_eq!(found.len(), 1, "{found:?}");
        let words = [
            "0.2.2 may have left: 6; ",
            "rfw(8), REPLACING RFW 0.2.2, shows",
            "run rfwc put '/accept/output/any/9.9.9.0/24?expire=0' && /usr/sbin/iptables-",
            " -D OUTPUT -d 9.9.9.0/24 -j ACCEPT to adopt",
        ];
        assert!(words.iter().all(|word| found[0].contains(word)), "{found:?}");
        assert_eq!(lab.rules(), [""; 0], "0.2.2's rules are only reported");

        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/man/rfw.8");
        let page = fs::read_to_string(page).unwrap();
        let section = page.split_once(".Sh REPLACING RFW 0.2.2").unwrap().1;
        let section = section.split("\n.Sh ").next().unwrap();
        let blocks = section.split(".Bd -literal").skip(1);
        let commands = blocks.map(|block| block.split_once('\n').unwrap().1);
        let commands = commands.map(|block| block.split(".Ed").next().unwrap());
        let commands: String = commands.collect::<String>().replace("\\e", "\\").replace("\\&", "");
        let commands = commands.replace("7393", "7399");
        // Pasted from man, which indents them.
        type_in(lab, &commands.replace('\n', "\n     "));
        let rules = [
            "FORWARD -s 1.2.3.0/24 -d 5.5.5.5/32 -j REJECT [rfw]",
            "FORWARD -s 6.6.6.6/32 -j DROP [rfw]",
            "INPUT -s 1.2.3.4/32 -j DROP [rfw]",
            "INPUT -s 7.7.7.0/24 -j DROP [rfw]",
            "INPUT -s 7.7.7.7/32 -j ACCEPT [rfw]",
            "OUTPUT -d 9.9.9.0/24 -j ACCEPT [rfw]",
        ];
        let mut adopted = lab.rules();
        let place = |rule| adopted.iter().position(|adopted| adopted == rule);
        assert!(place(rules[4]) < place(rules[3]), "the order of those that overlap: {adopted:?}");
        adopted.sort();
        assert_eq!(adopted, rules);
        assert_eq!(lab.others(), others);
        lab.clear_log();
        rfw.restart();
        await_report();
        assert_eq!(warnings(lab, ""), [""; 0]);
    });
}

/// Each command in the warning works. Without 0.2.2's guard rules, accepted addresses are
/// considered the administrator's own.
#[test]
fn rules_that_may_be_0_2_2s() {
    both(|lab| {
        lab.iptables("-A INPUT -s 10.0.0.0/9 -j ACCEPT");
        lab.iptables("-A INPUT -s 6.6.6.6 -j DROP");
        let mut rfw = lab.start("local.server\ndefault.expire = 600");
        await_report();
        let adopt = |found: &str| {
            let command = found.split_once("for the last one, run ").unwrap().1;
            type_in(lab, command.split(" to adopt").next().unwrap());
        };
        let found = warnings(lab, "0.2.2").concat();
        assert!(found.contains("0.2.2 may have left: 1; ") && !found.contains("guard"), "{found}");
        adopt(&found);
        assert_eq!(lab.rules(), ["INPUT -s 6.6.6.6/32 -j DROP [rfw]"]);
        lab.clear_log();
        rfw.restart();
        await_report();
        assert_eq!(warnings(lab, ""), [""; 0]);

        OLD[..4].iter().for_each(|rule| drop(lab.iptables(&format!("-I {rule}"))));
        rfw.restart();
        await_report();
        let found = warnings(lab, "0.2.2").concat();
        assert!(
            found.contains("0.2.2 may have left: 1; ") && !found.contains("guard"),
            "the accepted address counts only as long as the guards are there: {found}"
        );
        adopt(&found);
        assert_eq!(lab.rules()[0], "INPUT -s 10.0.0.0/9 -j ACCEPT [rfw]");
        lab.clear_log();
        rfw.restart();
        await_report();
        let found = warnings(lab, "0.2.2 left guard").concat();
        sh(found.split_once("remove them, run ").unwrap().1.split(';').next().unwrap());
        assert_eq!(lab.iptables("-S").matches("7399").count(), 0);
    });
}

/// Waits for the first check, and for the thread that reports leftovers, which starts earlier.
fn await_report() {
    let has_checked = || ask("GET /metrics").body.contains("rfw_rules{");
    await_true("the first check", 3 + SLACK, has_checked);
    await_true("the report", 30 + SLACK, || !is_reporting());
}

/// Whether the thread that reports leftovers runs. grep fails when any process ends meanwhile.
fn is_reporting() -> bool {
    !sh("grep -l leftovers /proc/[0-9]*/task/*/comm 2>/dev/null || true").is_empty()
}

/// Nothing expired and nothing was repaired as long as the report took: here, up to ten seconds.
#[test]
fn the_report_of_leftovers_delays_no_expiry() {
    once(|lab| {
        sh("/usr/sbin/iptables-legacy -S; /usr/sbin/ip6tables-legacy -S");
        let _holder = Process::start("flock -F /run/xtables.lock sleep 100");
        lab.configure("local.server");
        let mut rfw = lab.launch(&["/usr/bin/env"]);
        rfw.await_ready();
        assert_eq!(ask("PUT /drop/input/any/1.2.3.4?expire=1").status, 200);
        await_true("the rule has expired", 3 + SLACK, || lab.rules().is_empty());
        assert!(is_reporting(), "the report still waits");
    });
}

#[test]
fn rules_in_the_other_variant() {
    both(|lab| {
        let is_nft = lab.real("iptables").contains("nft");
        let other = |family| match is_nft {
            true => format!("/usr/sbin/{family}-legacy"),
            false => format!("/usr/sbin/{family}-nft"),
        };
        let tables = || sh("cat /proc/net/ip_tables_names /proc/net/ip6_tables_names");
        lab.configure("local.server");
        // As root, because only root sees the names of the legacy tables.
        let mut rfw = lab.launch(&["/usr/bin/env"]);
        rfw.await_ready();
        await_report();
        assert_eq!(warnings(lab, ""), [""; 0]);
        assert!(!is_nft || tables().is_empty(), "rfw has made legacy tables");

        let (v4, v6) = (other("iptables"), other("ip6tables"));
        let (old, mine) = ("-m comment --comment rfw:1795431795@a", "-m comment --comment rfwall");
        sh(&format!(
            "{v4} -A INPUT -s 1.1.1.1 {old} -j DROP; {v4} -A INPUT -s 2.2.2.2 {mine} -j DROP
             {v4} -A OUTPUT -d 3.3.3.3 -m comment --comment rfw -j REJECT
             {v4} -A INPUT -p tcp -m tcp --dport 7399 -m comment --comment rfw:guard -j DROP
             {v6} -A INPUT -s 2001:db8::1 -m comment --comment rfw -j DROP"
        ));
        for (program, count) in [(v4, 3), (v6, 1)] {
            rfw.kill();
            lab.clear_log();
            rfw = lab.launch(&["/usr/bin/env"]);
            rfw.await_ready();
            await_report();
            let found = warnings(lab, &format!("rules of rfw in {program}: {count}; "));
            assert_eq!(found.len(), 1, "{found:?}");
            sh(found[0].split_once("run ").unwrap().1);
            let left = sh(&format!("{program} -S"));
            assert_eq!(left.matches("rfw").count(), if count == 3 { 1 } else { 0 }, "{left}");
        }
        rfw.kill();
        lab.clear_log();
        rfw = lab.launch(&["/usr/bin/env"]);
        rfw.await_ready();
        await_report();
        assert_eq!(warnings(lab, ""), [""; 0]);
    });
}

/// The commands of both warnings end in `| sh`: they delete rfw's rules, and run nothing that the
/// comment, the interface or the log prefix of another rule says.
#[test]
fn the_commands_in_warnings_leave_the_rules_of_others_alone() {
    both(|lab| {
        let is_nft = lab.real("iptables").contains("nft");
        let other = if is_nft { "/usr/sbin/iptables-legacy" } else { "/usr/sbin/iptables-nft" };
        let touch = |n| format!("$(touch$IFS/run/ran{n})");
        let others = |iptables: &str| {
            let rules = [
                format!("-s 10.0.0.1 -p tcp --dport 7399 -j LOG --log-prefix '{}'", touch(1)),
                "-s 10.0.0.2 -p tcp --dport 7399 -j RETURN".into(),
                format!("-s 10.0.0.3 -m comment --comment 'x --comment rfw {}' -j DROP", touch(2)),
                "-s 10.0.0.4 -m comment --comment 'rfw:1 `touch /run/ran3`' -j DROP".into(),
                "-s 10.0.0.5 -i 'a;>ran' -m comment --comment rfw -j DROP".into(),
                "-s 10.0.0.6 -m comment --comment 'x --comment rfw -j' -j DROP".into(),
                "-s 10.0.0.7 -m comment --comment 'rfw of another' -j DROP".into(),
            ];
            let add = |rule: &String| sh(&format!("{iptables} -A INPUT {rule}"));
            rules.iter().for_each(|rule| drop(add(rule)));
        };
        lab.iptables("-A OUTPUT -p tcp --sport 7399 -j DROP");
        lab.iptables("-A INPUT -s 192.0.2.1 -p tcp --dport 7399 -j ACCEPT");
        let comments = ["rfw", "rfw:1795431795", "rfw@a", "rfw:1795431795@a-b.c_d"];
        for comment in comments {
            sh(&format!("{other} -A INPUT -s 1.1.1.1 -m comment --comment {comment} -j REJECT"));
        }
        let (mine, theirs) = (lab.real("iptables"), other);
        [&*mine, theirs].iter().for_each(|iptables| others(iptables));
        let left =
            |iptables: &str| sh(&format!("{iptables} -S | grep -c 10.0.0.")).trim().to_string();
        lab.configure("local.server");
        let mut rfw = lab.launch(&["/usr/bin/env"]);
        rfw.await_ready();
        await_report();
        let found = warnings(lab, "0.2.2 left guard").concat();
        let command =
            found.split_once("remove them, run ").unwrap().1.split("; rfw(8)").next().unwrap();
        sh(command);
        let found = warnings(lab, "rules of rfw in").concat();
        assert!(found.contains(&format!("{other}: 4; ")), "{found}");
        sh(&format!("cd lab; {}", found.split_once("run ").unwrap().1));
        assert_eq!((left(&mine), left(theirs)), ("7".into(), "7".into()));
        assert_eq!(sh(&format!("{mine} -S; {theirs} -S")).matches("7399").count(), 4);
        assert_eq!(sh(&format!("{theirs} -S")).matches("1.1.1.1").count(), 0);
        assert_eq!(sh("ls -d /run/ran* /run/lab/ran* 2>/dev/null || true"), "");
    });
}

/// A set that a foreign rule uses cannot be destroyed, and never keeps rfw from starting.
#[test]
fn sets_in_use_by_others() {
    both(|lab| {
        let name = "rfw4:drop:in:any";
        let user = format!("INPUT -m set --match-set {name} src -j LOG");
        let mut rfw = lab.start(&format!("local.server\n{SETS}"));
        ask("PUT /drop/input/any/1.2.3.4");
        lab.iptables(&format!("-A {user}"));
        // Without sets, and with them again
        for (line, is_used) in [("", false), (SETS, true)] {
            lab.configure(&format!("local.server\n{line}"));
            lab.clear_log();
            rfw.restart();
            let found = warnings(lab, &format!("the set {name} remains"));
            assert_eq!(found.len(), usize::from(!is_used), "{found:?}");
            assert_eq!(ask("GET /list").field("source"), "1.2.3.4");
        }
        ask("DELETE /drop/input/any/1.2.3.4");
        lab.clear_log();
        rfw.restart();
        let found = warnings(lab, &format!("iptables-save | grep {name}"));
        assert_eq!(found.len(), 1, "{found:?}");
        lab.iptables(&format!("-D {user}"));
        rfw.restart();
        assert_eq!(lab.ipset("list -n"), "");
    });
}

/// Checks that `rfw -t` and a start both fail with a sentence that contains all words.
fn assert_refused(lab: &Lab, words: &[&str]) {
    for options in ["-t -f rfw.conf", "-f rfw.conf --logfile -"] {
        let (status, said) = lab.rfw(options);
        let all = words.iter().all(|word| said.contains(word));
        assert!(status == 1 && all, "{options}: {status} {said}, not {words:?}");
    }
}

#[test]
fn an_outdated_iptables() {
    once(|lab| {
        for (me, line) in [("iptables", 3), ("ip6tables", 0)] {
            let stand_in = format!(
                "case \"$me $*\" in
                 \"{me} \"*-V*|\"{me} --version\") echo \"$me v1.4.21\"; exit 0;;
                 {me}-restore*-w*) echo \"$me: invalid option -- 'w'\" >&2; exit 2;; esac"
            );
            lab.stand_in(&stand_in);
            lab.configure("local.server");
            let place = if line > 0 { format!("rfw.conf:{line}: ") } else { "rfw.conf: ".into() };
            assert_refused(lab, &[&place, &format!("/bin/{me} is too old"), "1.6.2"]);
        }
        lab.stand_in(
            "[ \"$1\" != --version ] || { echo 'nftables v1.0.6 (Lester Gooch #5)'; exit 0; }",
        );
        assert_refused(lab, &["is not iptables"]);
        lab.stand_in("[ \"$1\" != --version ] || exit 0");
        assert_refused(lab, &["is not iptables"]);
        lab.stand_in("");
        let iptables = lab.dir.join("bin/iptables");
        lab.configure(&format!("local.server\nip6tables.path = {}", iptables.display()));
        assert_refused(lab, &["rfw.conf:5: ", "bin/iptables is not ip6tables"]);
        lab.configure("local.server");
        lab.stand_in("[ \"$1\" != -j ] || exec /bin/sleep 99");
        let (status, text) = lab.rfw("-t -f rfw.conf");
        assert!(status == 1 && text.contains("hung and was killed"), "{text}");
    });
}

/// As while a slow host boots, when the network must not start without the rules.
#[test]
fn an_iptables_that_takes_seconds_to_start() {
    once(|lab| {
        lab.stand_in("[ \"$1\" != --version ] || /bin/sleep 6");
        lab.start("local.server");
    });
}

/// Runs `body` on a copy of iptables' extension files that lacks one.
fn without_file(file: &str, body: impl FnOnce()) {
    let directory =
        sh("ls -d /usr/lib/*/xtables /usr/lib/xtables /lib/xtables 2>/dev/null || true");
    let directory = directory.lines().next().expect("iptables' extension files");
    sh(&format!(
        "rm -rf xtables; cp -a {directory} xtables; rm xtables/{file}; mount --bind xtables {directory}"
    ));
    body();
    sh(&format!("umount {directory}"));
}

#[test]
fn iptables_without_an_extension() {
    both(|lab| {
        let rows = [
            ("libxt_comment.so", "", true),
            ("libipt_REJECT.so", "", true),
            ("libip6t_REJECT.so", "", true),
            ("libxt_set.so", "", false),
            ("libxt_set.so", SETS, true),
        ];
        for (file, line, is_refused) in rows {
            lab.configure(&format!("local.server\n{line}"));
            without_file(file, || match is_refused {
                true => assert_refused(
                    lab,
                    &["rfw.conf:", &format!("install {file}"), "is part of iptables"],
                ),
                false => assert_eq!(lab.rfw("-t -f rfw.conf").0, 0),
            });
            assert_eq!(lab.rfw("-t -f rfw.conf").0, 0);
        }
    });
}

/// A stand-in for iptables-restore on a kernel that rejects rules with an extension.
fn restore_without(extension: &str) -> String {
    format!(
        "case $me in iptables-restore) cat >$lab/in; if grep -q {extension} $lab/in
         then echo 'iptables-restore: line 4 failed' >&2; exit 1; fi
         exec $real \"$@\" <$lab/in;; esac"
    )
}

/// strace fakes the kernel's response; the messages are those of the real iptables.
#[test]
fn a_kernel_without_an_extension() {
    both(|lab| {
        if !has_strace("a_kernel_without_an_extension") {
            return;
        }
        let modules = [("comment", "xt_comment"), ("REJECT", "ipt_REJECT"), ("set", "xt_set")];
        for (extension, module) in modules {
            lab.stand_in(&format!(
                "case \"$*\" in *\"--comment rfw\"|*--reject-with*|*\"-m set\")
                 case \"$*\" in *{extension}*)
                 exec strace -fo /dev/null -e inject=getsockopt,recvmsg:error=ENOENT $real \"$@\";; esac;; esac
                 {}",
                restore_without(extension)
            ));
            lab.configure(&format!("local.server\n{SETS}"));
            // Before 1.8.8, it is the second of two possible causes.
            let is_old = lab.iptables("--version").contains(" v1.8.7 ");
            let remedy = if is_old { "" } else { ": load, install or build it" };
            let needs = format!("the kernel needs the module {module}{remedy}");
            assert_refused(lab, &["rfw.conf:3: ", &needs]);
        }
        // Before 1.8.8, iptables does not ask the kernel first.
        for (extension, module) in modules.into_iter().take(2) {
            lab.stand_in(&restore_without(extension));
            lab.configure("local.server");
            let (status, said) = lab.rfw("-f rfw.conf --logfile -");
            assert!(
                status == 1 && said.contains(&format!("the module {module} ")),
                "{status} {said}"
            );
        }
    });
}
