//! Every command of README.md, in its order, on a copy of /etc and with an empty /usr/local; then the
//! command of rfw(8) that removes all rules.
//!
//! ```text
//! lab "server" 192.0.2.10 ------ veth ------ netns "admin" 192.0.2.20 ("your machine")
//! ```

use crate::lab::{Process, once, sh};
use std::fs;

const SOURCE: &str = env!("CARGO_MANIFEST_DIR");
const ON_ADMIN: &str = "# on your machine\n";

/// Commands that are not run: this test is a part of the first one, and the second one, which needs
/// PyPI, is what `make static-test` tests.
const NOT_RUN: [&str; 2] = ["make test\n", "make static TARGET=aarch64  "];

/// What the lab has no real program for. systemctl runs ExecStart= of the installed unit with its
/// directories, and returns, as with Type=notify, when rfw answers; scp and ssh need no sshd. Nothing here needs
/// firewall-cmd; tests/firewalls.py runs it.
const PRELUDE: &str = r#"
set -euo pipefail -o allexport
PATH="/usr/local/sbin:/usr/local/bin:$PATH"
CURL_CA_BUNDLE=/run/lab/feeds/client/ca.crt
make() { command make -C "$SOURCE" "$@"; }
start_rfw() {
    mkdir -p -m 700 /var/lib/rfw
    CREDENTIALS_DIRECTORY=/etc/rfw
    eval "exec $(sed -n 's/^ExecStart=//p' /usr/local/lib/systemd/system/rfw.service)" >>/run/lab/journal 2>&1 &
    echo $! > /run/lab/pid
    until curl -so /dev/null 127.0.0.1:7390; do kill -0 $! || exit 1; sleep .1; done
}
stop_rfw() { kill $(cat /run/lab/pid); while [ -e /proc/$(cat /run/lab/pid) ]; do sleep .1; done; }
systemctl() {
    case "$*" in
    daemon-reload) ;;
    "start rfw" | "enable --now rfw") start_rfw ;;
    "stop rfw" | "disable --now rfw") stop_rfw ;;
    "restart rfw") stop_rfw; start_rfw ;;
    *) echo "systemctl $*?"; false ;;
    esac
}
firewall-cmd() { :; }
scp() { cp "${@:1:$#-1}" "${!##root@192.0.2.10:}"; }
ssh() { [ "$1" = root@192.0.2.10 ]; nsenter --net=/run/lab/server bash -euc "$2"; }
cd /run/lab
ln -s "$SOURCE/contrib" .
set -x
"#;

/// The blocks of a page that begin with "```LANGUAGE".
fn blocks<'a>(page: &'a str, language: &str) -> Vec<&'a str> {
    let open = format!("```{language}\n");
    let rest = page.split(&open).skip(1);
    rest.map(|rest| rest.split_once("```").expect("an open block").0).collect()
}

/// The commands of the block in rfw(8) that removes all rules: mdoc escapes a backslash.
fn removal() -> String {
    let page = fs::read_to_string(format!("{SOURCE}/contrib/man/rfw.8")).unwrap();
    let blocks = page.split(".Bd -literal -offset indent\n").skip(1);
    let blocks = blocks.map(|rest| rest.split_once(".Ed\n").expect("an open block").0);
    let found = blocks.filter(|block| block.starts_with("iptables-save")).collect::<Vec<_>>();
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].replace("\\e", "\\")
}

#[test]
fn every_command_of_the_readme() {
    once(|lab| {
        sh("cp -a /etc /run/etc 2>&1 || true; mount --bind /run/etc /etc
            rm -rf /etc/rfw /etc/fail2ban /etc/crowdsec /etc/systemd/system/rfw.service.d
            for dir in /usr/local/*/ /var/log /var/lib /var/cache; do mount -t tmpfs lab $dir; done
            touch lab/server; mount --bind /proc/self/ns/net lab/server
            ip netns add admin; ip link add eth0 type veth peer name eth0 netns admin
            ip addr add 192.0.2.10/24 dev eth0; ip link set eth0 up
            ip -n admin addr add 192.0.2.20/24 dev eth0; ip -n admin link set eth0 up
            iptables -A INPUT -s 192.0.2.99 -j DROP");
        sh(&format!(
            "cd lab; {SOURCE}/contrib/rfwgen feeds.example feeds >/dev/null
             echo 127.0.0.1 feeds.example >> /etc/hosts; echo 198.51.100.77 > feeds/drop.txt"
        ));
        let pair = "-cert server_feeds.example/server.crt -key server_feeds.example/server.key";
        let serve = format!("openssl s_server -accept 127.0.0.1:443 {pair} -WWW");
        let _feeds = Process::start(&format!("env -C /run/lab/feeds {serve}"));

        let readme = fs::read_to_string(format!("{SOURCE}/README.md")).unwrap();
        let mut script = PRELUDE.replace("$SOURCE", SOURCE);
        for (number, block) in blocks(&readme, "sh").iter().enumerate() {
            let block = NOT_RUN.iter().fold(block.to_string(), |block, not| block.replace(not, ""));
            // A failure before a && would not end the script.
            let block = block.replace(" && ", "\n");
            if let Some(block) = block.strip_prefix(ON_ADMIN) {
                let name = format!("admin{number}.sh");
                lab.write(&name, block);
                script += &format!("nsenter --net=/run/netns/admin bash -euxo pipefail {name}\n");
            } else {
                script += &block;
            }
        }
        lab.write("readme.sh", &(script + &removal()));
        let said = sh("bash /run/lab/readme.sh 2>&1 || echo FAILED");
        let wrong = ["FAILED", "\"error\"", "No such file"];
        assert!(wrong.iter().all(|word| !said.contains(word)), "{said}");
        // The answer at the head of the page, up to the time of expiry.
        let answer = readme.lines().find_map(|line| line.strip_prefix("    {")).unwrap();
        let answer = answer.split("\"expires\"").next().unwrap();
        for shown in [
            concat!(
                "rfw ",
                env!("CARGO_PKG_VERSION"),
                " at https://0.0.0.0:7393, http://127.0.0.1:7390"
            ),
            answer,
            &answer.replace("inserted", "deleted"),
            "rfw_build_info{version=",
            "200 applied: inserted 1, ",
            "200 applied: deleted 1",
            "7390: 200 inserted",
        ] {
            assert!(said.contains(shown), "{shown}\n{said}");
        }
        let conf = fs::read_to_string("/etc/rfw/rfw.conf").unwrap();
        for line in ["auth.file = users", "state.file = ", "ipset.path = "] {
            assert!(conf.contains(&format!("\n{line}")), "{line}\n{conf}");
        }
        assert_eq!(lab.rules(), Vec::<String>::new());
        assert_eq!(lab.guards(), Vec::<String>::new());
        assert_eq!(lab.ipset("list -n"), "");
        assert_eq!(lab.others()[3], "-A INPUT -s 192.0.2.99/32 -j DROP");
    });
}

/// What is shown without being run, the one example above all, is run further below.
#[test]
fn every_command_is_in_a_block_that_is_run() {
    let readme = fs::read_to_string(format!("{SOURCE}/README.md")).unwrap();
    let run = blocks(&readme, "sh").concat();
    let shown = readme.lines().filter_map(|line| line.strip_prefix("    $ "));
    let missing: Vec<_> = shown.filter(|line| !run.contains(&format!("\n{line}\n"))).collect();
    assert!(missing.is_empty(), "{missing:#?}");
    let fences = readme.matches("\n```").count();
    assert_eq!(fences, 2 * (blocks(&readme, "sh").len() + blocks(&readme, "yaml").len()));
}
