//! SPEC 5: what rfw finds at start and reports: an iptables that cannot do what rfw needs.

use crate::lab::*;

/// rfw -t and a start: both fail with a sentence that has all words.
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
        assert_refused(lab, &["too old"]);
        lab.stand_in("[ \"$1\" != --version ] || exit 0");
        assert_refused(lab, &["is not iptables"]);
    });
}

/// Runs `body` on a copy of iptables' extension files that lacks one.
fn without_file(file: &str, body: impl FnOnce()) {
    let folder = sh("ls -d /usr/lib/*/xtables /usr/lib/xtables /lib/xtables 2>/dev/null || true");
    let folder = folder.lines().next().expect("iptables' extension files");
    sh(&format!(
        "rm -rf xtables; cp -a {folder} xtables; rm xtables/{file}; mount --bind xtables {folder}"
    ));
    body();
    sh(&format!("umount {folder}"));
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
                    &["rfw.conf:", &format!("install {file}"), "belongs to iptables"],
                ),
                false => assert_eq!(lab.rfw("-t -f rfw.conf").0, 0),
            });
            assert_eq!(lab.rfw("-t -f rfw.conf").0, 0);
        }
    });
}

/// The kernel's answer is strace's, the words are those of the real iptables.
#[test]
fn a_kernel_without_an_extension() {
    both(|lab| {
        if !has_strace("a_kernel_without_an_extension") {
            return;
        }
        for extension in ["comment", "REJECT", "set"] {
            lab.stand_in(&format!(
                "case \"$*\" in *\"--comment rfw\"|*--reject-with*|*\"-m set\")
                 case \"$*\" in *{extension}*)
                 exec strace -fo /dev/null -e inject=getsockopt,recvmsg:error=ENOENT $real \"$@\";; esac;; esac"
            ));
            lab.configure(&format!("local.server\n{SETS}"));
            let module = format!("_{extension}: load, install or build it");
            assert_refused(lab, &["rfw.conf:3: ", "the kernel needs the module", &module]);
        }
        // Before 1.8.8, iptables does not ask the kernel first.
        for (extension, module) in [("comment", "xt_comment"), ("REJECT", "ipt_REJECT")] {
            lab.stand_in(&format!(
                "case $me in iptables-restore) cat >$lab/in; if grep -q {extension} $lab/in
                 then echo 'iptables-restore: line 4 failed' >&2; exit 1; fi
                 exec $real \"$@\" <$lab/in;; esac"
            ));
            lab.configure("local.server");
            let (status, said) = lab.rfw("-f rfw.conf --logfile -");
            assert!(
                status == 1 && said.contains(&format!("the module {module} ")),
                "{status} {said}"
            );
        }
    });
}
