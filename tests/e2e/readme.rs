//! Every command of README.md, in its order, on a copy of /etc and with an empty /usr/local.

use crate::lab::{once, sh};
use std::fs;

const SOURCE: &str = env!("CARGO_MANIFEST_DIR");

/// What the reader's shell has around the commands: the network of the example, and `make` from
/// wherever they stand. Once rfw is started, the reader goes on when it answers.
const PRELUDE: &str = r#"
set -euo pipefail
export PATH="/usr/local/sbin:/usr/local/bin:$PATH"
make() { command make -C "$SOURCE" "$@"; }
started() { until curl -so /dev/null 127.0.0.1:7390; do sleep .1; done; }
cd /run/lab
set -x
"#;

#[test]
fn every_command_of_the_readme() {
    once(|lab| {
        sh("cp -a /etc /run/etc 2>&1 || true; mount --bind /run/etc /etc; rm -rf /etc/rfw
            for dir in /usr/local/*/ /var/log; do mount -t tmpfs lab $dir; done
            ip address add 192.0.2.10/32 dev lo; iptables -A INPUT -s 192.0.2.99 -j DROP");
        let readme = fs::read_to_string(format!("{SOURCE}/README.md")).unwrap();
        let blocks = readme.split("```sh\n").skip(1);
        let mut script = PRELUDE.replace("$SOURCE", SOURCE);
        for block in blocks.map(|rest| rest.split_once("```").expect("an open block").0) {
            // This test is itself a part of `make test`.
            let block = block.replace("make test\n", "").replace("rfw &\n", "rfw & started\n");
            // "Stop it, and then".
            let stop = if block.contains("iptables-save") { "kill %%; wait || true\n" } else { "" };
            script += &format!("{stop}{block}");
        }
        lab.write("readme.sh", &script);
        let said = sh("bash /run/lab/readme.sh 2>&1 || echo FAILED");
        let blocked = said.contains(r#"{"result":"inserted","rule":{"chain":"INPUT""#);
        assert!(blocked && !said.contains("FAILED"), "{said}");
        assert!(said.contains(r#""destination":"203.0.113.9""#), "{said}");
        assert!(!said.contains("\"error\""), "{said}");
        assert_eq!(lab.rules(), Vec::<String>::new());
        assert_eq!(lab.others()[3], "-A INPUT -s 192.0.2.99/32 -j DROP");
    });
}
