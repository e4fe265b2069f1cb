//! The lock that ensures that only one rfw runs in a network namespace.

use crate::file::own_user;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// rfw holds it, and so does each program that changes rules, as its standard output, until the last
/// of them ends. Thus rfw waits for a program that outlived a killed rfw before it reads the kernel.
pub struct InstanceLock(pub(super) File);

impl InstanceLock {
    /// Waits while another rfw, or a program that a killed rfw started, holds the lock, and calls
    /// `on_wait` before. The error is a sentence.
    pub fn take(limit: Duration, on_wait: impl FnOnce()) -> Result<InstanceLock, String> {
        // OpenWrt before 24.10 has no /run.
        let run = if Path::new("/run").is_dir() { "/run" } else { "/var/run" };
        let directory = Path::new(run).join("rfw");
        let unusable = |error: io::Error| {
            let link = match error.kind() {
                ErrorKind::AlreadyExists => "remove it, if it is a link that a stopped unit left; ",
                _ => "",
            };
            format!(
                "cannot lock {0}: {error}; {link}if the systemd unit runs rfw, use systemctl; otherwise, as \
                 root, run install -d -m 700 -o USER {0}, where USER runs rfw",
                directory.display()
            )
        };
        let (file, path) = open_lock(&directory).map_err(unusable)?;
        let started = Instant::now();
        let mut on_wait = Some(on_wait);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(InstanceLock(file)),
                Err(TryLockError::Error(error)) => return Err(unusable(error)),
                Err(TryLockError::WouldBlock) => {}
            }
            if started.elapsed() >= limit {
                return Err(format!(
                    "another rfw is still running, or a program that a killed rfw started; stop it \
                     first (fuser -v {} shows it)",
                    path.display()
                ));
            }
            if let Some(on_wait) = on_wait.take() {
                on_wait();
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Opens the lock file of this network namespace. Only root can create `directory` or change its
/// owner, and only its owner can enter it: no other user can hold the lock or replace the file by a
/// link.
fn open_lock(directory: &Path) -> io::Result<(File, PathBuf)> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let data = fs::metadata(directory)?;
    let (owner, mode) = (data.uid(), data.mode() & 0o777);
    if ![0, own_user()].contains(&owner) || mode & 0o077 != 0 {
        let message = format!("other users can enter it (owner {owner}, mode {mode:o})");
        return Err(io::Error::other(message));
    }
    // A kernel without namespaces has no such file.
    let namespace = fs::metadata("/proc/self/ns/net").map_or(0, |data| data.ino());
    let path = directory.join(format!("net-{namespace}"));
    match File::options().write(true).create_new(true).mode(0o600).open(&path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        // Read-only, so that no program can fill the disk through its standard output.
        _ => Ok((File::open(&path)?, path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_lock_file_is_in_a_directory_that_only_its_owner_can_enter() {
        let directory = std::env::temp_dir().join(format!("rfw-lock-{}", std::process::id()));
        let mode =
            |mode| fs::set_permissions(&directory, fs::Permissions::from_mode(mode)).unwrap();
        let (first, path) = open_lock(&directory).unwrap();
        let (second, same) = open_lock(&directory).unwrap();
        assert_eq!((fs::metadata(&directory).unwrap().mode() & 0o777, &path), (0o700, &same));
        first.try_lock().unwrap();
        assert!(matches!(second.try_lock(), Err(TryLockError::WouldBlock)));
        let held = first.try_clone().unwrap();
        drop(first);
        assert!(matches!(second.try_lock(), Err(TryLockError::WouldBlock)), "inherited");
        drop(held);
        second.try_lock().unwrap();
        assert!((&second).write(b"x").is_err(), "nothing can be written to it");
        for open in [0o701, 0o710, 0o755, 0o770] {
            mode(open);
            let error = open_lock(&directory).unwrap_err().to_string();
            assert!(error.contains(&format!("mode {open:o})")), "{error}");
        }
        mode(0o700);
        fs::remove_file(&path).unwrap();
        let victim = directory.join("victim");
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        assert_eq!(open_lock(&directory).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(!victim.exists());
        fs::remove_dir_all(&directory).unwrap();
        fs::write(&directory, "").unwrap();
        mode(0o600);
        assert!(open_lock(&directory).is_err(), "it is a file");
        fs::remove_file(&directory).unwrap();
    }
}
