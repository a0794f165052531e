//! `sonnette keys`: a development provider key, and what a .p8 file holds.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

use crate::{apns::credential, cli::say, domain::secret::Secret};

/// Provider keys.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Makes a P-256 key for development: APNs itself takes only keys made in the Apple developer account.
    Generate {
        /// The file to make; refused if it exists.
        #[arg(default_value = "AuthKey_DEVELOPMENT.p8")]
        file: PathBuf,
    },
    /// Says what a .p8 file holds: the public key, never the private one.
    Inspect {
        /// The file.
        file: PathBuf,
    },
}

/// Runs the command.
///
/// # Errors
/// What is in the way.
pub fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Generate { file } => {
            generate(file)?;
            say(format_args!("{}: a new P-256 key, readable by you alone", file.display()));
        }
        Command::Inspect { file } => {
            let pem = std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
            let found =
                credential::inspect(&Secret::new(pem)).with_context(|| format!("{} cannot be used", file.display()))?;
            say(format_args!("{}: a P-256 private key in PKCS#8, as APNs wants it", file.display()));
            say(format_args!("SHA-256 of its public key: {}", found.public_key_sha256));
            say(found.public_key_pem.trim_end());
        }
    }
    Ok(())
}

/// Makes a key file that only its owner can read.
pub(crate) fn generate(file: &Path) -> anyhow::Result<()> {
    if file.exists() {
        bail!("{} exists already: name another file, keys are not overwritten", file.display());
    }
    let pem = credential::generate()?;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
        .open(file)
        .and_then(|mut made| made.write_all(pem.expose().as_bytes()))
        .with_context(|| format!("{} cannot be written", file.display()))
}
