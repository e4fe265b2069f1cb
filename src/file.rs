//! Checks who may own, write and read the files that configure rfw, and those that contain secrets.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// What users other than the owner may do with a file; none may write to it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Readable,
    /// Nothing: it contains a private key or a password.
    Secret,
}

/// Checks that root or the user who runs this program owns a file, and what others may do with it.
/// The error says what is wrong, and which command corrects it.
pub fn check(file: &Path, data: &Metadata, access: Access) -> Result<(), String> {
    if !data.is_file() && !data.file_type().is_fifo() {
        return Err("it is not a regular file".into());
    }
    let (name, owner, own) = (file.display(), data.uid(), own_user());
    if ![0, own].contains(&owner) {
        let own = if own == 0 { "root".into() } else { own.to_string() };
        return Err(format!("user {owner} owns it; run chown {own} {name}"));
    }
    let chmod = if access == Access::Secret { "chmod 600" } else { "chmod go-w" };
    if data.mode() & 0o022 != 0 {
        return Err(format!("other users can write to it; run {chmod} {name}"));
    }
    // systemd's credentials have an ACL, whose mask shows as the rights of the group root.
    let is_credential = file.starts_with("/run/credentials") && data.gid() == 0;
    let may_read = if is_credential { 0o004 } else { 0o044 };
    if access == Access::Secret && data.mode() & may_read != 0 {
        return Err(format!("other users can read the secret in it; run {chmod} {name}"));
    }
    Ok(())
}

/// Checks a file, then reads it.
pub fn read(file: &Path, access: Access) -> Result<Vec<u8>, String> {
    let name = file.display();
    let failed = |error: io::Error| format!("{name}: cannot read it: {error}");
    let mut open = File::open(file).map_err(failed)?;
    let data = open.metadata().map_err(failed)?;
    check(file, &data, access).map_err(|message| format!("{name}: {message}"))?;
    let mut content = Vec::new();
    open.read_to_end(&mut content).map_err(failed)?;
    Ok(content)
}

/// Reads a text, without a byte order mark, which some editors write.
pub fn read_text(file: &Path, access: Access) -> Result<String, String> {
    let content = read(file, access)?;
    let text = String::from_utf8(content).map_err(|_| format!("{}: not UTF-8", file.display()))?;
    // A comment would hide what follows it in the same line.
    if let Some(line) = text.lines().position(|line| line.contains('\r')) {
        let (name, line) = (file.display(), line.saturating_add(1));
        return Err(format!("{name}:{line}: a carriage return without a line feed; remove it"));
    }
    Ok(text.trim_start_matches('\u{feff}').into())
}

/// The user that runs this program. Without /proc it counts as root, and only root is trusted.
pub fn own_user() -> u32 {
    fs::metadata("/proc/self").map_or(0, |data| data.uid())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// No advice to take /dev/null or /tmp from other users.
    #[test]
    fn devices_and_directories() {
        for path in ["/dev/null", "/dev/zero", "/tmp", "/"] {
            for access in [Access::Readable, Access::Secret] {
                let error = read(Path::new(path), access).unwrap_err();
                assert_eq!(error, format!("{path}: it is not a regular file"));
            }
        }
    }

    /// What [`read_text`] returns for a file with this text.
    fn written_and_read(name: &str, text: &str) -> Result<String, String> {
        let path = std::env::temp_dir().join(format!("rfw-file-{name}-{}", std::process::id()));
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let read = read_text(&path, Access::Secret);
        fs::remove_file(&path).unwrap();
        read
    }

    #[test]
    fn a_byte_order_mark_is_dropped() {
        assert_eq!(written_and_read("mark", "\u{feff}x"), Ok("x".into()));
    }

    #[test]
    fn a_comment_hides_no_line() {
        for (text, is_right) in [("# x\r\ny\r\n", true), ("# x\ry\n", false), ("x\r", false)] {
            assert_eq!(written_and_read("cr", text).is_ok(), is_right, "{text:?}");
        }
    }

    /// Owners are tested end to end, because only root can give a file away.
    #[test]
    fn modes() {
        let path = std::env::temp_dir().join(format!("rfw-file-{}", std::process::id()));
        fs::write(&path, "x").unwrap();
        let table = [
            (0o400, "", ""),
            (0o604, "", "read"),
            (0o640, "", "read"),
            (0o602, "go-w", "write"),
            (0o620, "go-w", "write"),
        ];
        for (mode, readable, secret) in table {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            for (access, word) in [(Access::Readable, readable), (Access::Secret, secret)] {
                let error = read(&path, access).err().unwrap_or_default();
                assert_eq!(error.is_empty(), word.is_empty(), "{mode:o} {error}");
                let chmod = if access == Access::Secret { "chmod 600" } else { "chmod go-w" };
                let run = format!("; run {chmod} {}", path.display());
                assert!(
                    error.is_empty() || error.contains(word) && error.ends_with(&run),
                    "{error}"
                );
            }
        }
        fs::remove_file(&path).unwrap();
    }
}
