//! Tells the supervisor that started rfw that it is ready: the protocol of sd_notify(3).

use crate::log::Log;
use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;
use std::{env, io};

/// How long a supervisor that reads nothing may delay rfw.
const LIMIT: Duration = Duration::from_secs(5);

/// Sends `READY=1` to the socket that NOTIFY_SOCKET names, a path or `@` and an abstract name.
pub fn ready(log: &Log) {
    let Some(name) = env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(&name) {
        let name = name.display();
        log.warning(format_args!("cannot send READY=1 to NOTIFY_SOCKET={name}: {error}"));
    }
}

fn send(name: &OsStr) -> io::Result<()> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(LIMIT))?;
    socket.send_to_addr(b"READY=1", &address).map(drop)
}
