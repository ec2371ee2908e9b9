//! What a machine must have: found with its version, installed where that is allowed, or named with the exact command.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::unistd::Uid;

use crate::failure::{Exit, Failure};
use crate::java::{Java, OLDEST};
use crate::process;
use crate::progress::Progress;

const INSTALL_DEADLINE: Duration = Duration::from_secs(15 * 60);

/// A program or library that something here needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    Cargo,
    CCompiler,
    Make,
    PkgConfig,
    OpenSsl,
    Zlib,
    Java,
    Maven,
    Tar,
    Xz,
}

/// One line of `./dev doctor`.
#[derive(Debug, Clone)]
pub struct Finding {
    pub tool: Tool,
    /// Version or place when found.
    pub found: Option<String>,
}

impl Tool {
    pub const ALL: [Self; 10] = [
        Self::Cargo,
        Self::CCompiler,
        Self::Make,
        Self::PkgConfig,
        Self::OpenSsl,
        Self::Zlib,
        Self::Java,
        Self::Maven,
        Self::Tar,
        Self::Xz,
    ];
    /// To build the workspace.
    pub const FOR_BUILD: [Self; 6] = [
        Self::Cargo,
        Self::CCompiler,
        Self::Make,
        Self::PkgConfig,
        Self::OpenSsl,
        Self::Zlib,
    ];
    /// To run Kafka.
    pub const FOR_KAFKA: [Self; 1] = [Self::Java];
    /// To fill the cache of server programs once.
    pub const FOR_FETCH: [Self; 4] = [Self::Java, Self::Maven, Self::Tar, Self::Xz];

    pub fn name(self) -> &'static str {
        match self {
            Self::Cargo => "cargo",
            Self::CCompiler => "C and C++ compiler (cc, c++)",
            Self::Make => "make",
            Self::PkgConfig => "pkg-config",
            Self::OpenSsl => "OpenSSL headers",
            Self::Zlib => "zlib headers",
            Self::Java => "Java 17 or newer",
            Self::Maven => "Maven (mvn)",
            Self::Tar => "tar",
            Self::Xz => "xz",
        }
    }

    /// What it is for.
    pub fn purpose(self) -> &'static str {
        match self {
            Self::Cargo => "builds the services",
            Self::CCompiler | Self::Make => "build the Kafka client library",
            Self::PkgConfig | Self::OpenSsl | Self::Zlib => "the Kafka client library links to OpenSSL and zlib",
            Self::Java => "runs Kafka and Maven",
            Self::Maven => "fetches PostgreSQL and Kafka, once",
            Self::Tar | Self::Xz => "unpack PostgreSQL, once",
        }
    }

    fn look(self) -> Option<String> {
        match self {
            Self::Cargo => first_line("cargo", &["--version"]),
            // librdkafka's configure script wants both.
            Self::CCompiler => first_line("c++", &["--version"]).and_then(|_| first_line("cc", &["--version"])),
            Self::Make => first_line("make", &["--version"]),
            Self::PkgConfig => first_line("pkg-config", &["--version"]),
            Self::OpenSsl => first_line("pkg-config", &["--modversion", "openssl"]),
            Self::Zlib => first_line("pkg-config", &["--modversion", "zlib"]),
            Self::Java => Java::find()
                .ok()
                .map(|java| format!("{} in {}", java.version, java.path.display())),
            // `mvn --version` starts a virtual machine; that it is there is enough.
            Self::Maven => on_path("mvn").map(|path| path.display().to_string()),
            Self::Tar => first_line("tar", &["--version"]),
            Self::Xz => first_line("xz", &["--version"]),
        }
    }

    fn debian_packages(self) -> Vec<String> {
        let names: &[&str] = match self {
            Self::Cargo => &[],
            Self::CCompiler => &["g++", "libc6-dev"],
            Self::Make => &["make"],
            Self::PkgConfig => &["pkg-config"],
            Self::OpenSsl => &["libssl-dev"],
            Self::Zlib => &["zlib1g-dev"],
            Self::Java => return vec![debian_java()],
            Self::Maven => &["maven"],
            Self::Tar => &["tar"],
            Self::Xz => &["xz-utils"],
        };
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn homebrew_package(self) -> Option<&'static str> {
        match self {
            Self::Cargo | Self::CCompiler | Self::Make | Self::Tar => None,
            Self::PkgConfig => Some("pkgconf"),
            Self::OpenSsl => Some("openssl@3"),
            Self::Zlib => Some("zlib"),
            Self::Java => Some("openjdk@17"),
            Self::Maven => Some("maven"),
            Self::Xz => Some("xz"),
        }
    }
}

/// Looks for each tool.
pub fn look(tools: &[Tool]) -> Vec<Finding> {
    tools
        .iter()
        .map(|&tool| Finding {
            tool,
            found: tool.look(),
        })
        .collect()
}

/// The command that installs `missing` on this system, for a person to type.
pub fn install_command(missing: &[Tool]) -> String {
    let mut commands = Vec::new();
    if missing.contains(&Tool::Cargo) {
        commands.push("install Rust with rustup".to_owned());
    }
    let others: Vec<Tool> = missing.iter().copied().filter(|&tool| tool != Tool::Cargo).collect();
    if others.is_empty() {
    } else if on_path("apt-get").is_some() {
        let packages = debian_packages(&others).join(" ");
        let install = format!("apt-get update && apt-get install -y --no-install-recommends {packages}");
        if Uid::effective().is_root() {
            commands.push(install);
        } else {
            commands.push(format!("sudo sh -c '{install}'"));
        }
    } else if on_path("brew").is_some() {
        let packages: Vec<&str> = others.iter().filter_map(|tool| tool.homebrew_package()).collect();
        commands.push(format!("brew install {}", packages.join(" ")));
    } else {
        let names: Vec<&str> = others.iter().map(|tool| tool.name()).collect();
        commands.push(format!("install with your package manager: {}", names.join(", ")));
    }
    commands.join("; then ")
}

/// Finds `tools`; installs what is missing when the caller is root on a system with apt-get.
///
/// Errors with the exact command otherwise, and when the installation did not help.
pub async fn ensure(tools: &[Tool], log: &Path, progress: &Progress) -> anyhow::Result<()> {
    let missing = missing(tools);
    if missing.is_empty() {
        return Ok(());
    }
    let may_install = Uid::effective().is_root() && on_path("apt-get").is_some() && !missing.contains(&Tool::Cargo);
    if may_install {
        install(&missing, log, progress).await?;
    }
    let missing = self::missing(tools);
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|tool| tool.name()).collect();
    Err(Failure::new(
        Exit::Dependency,
        format!("missing: {}", names.join(", ")),
        install_command(&missing),
    )
    .into())
}

async fn install(missing: &[Tool], log: &Path, progress: &Progress) -> anyhow::Result<()> {
    let names: Vec<&str> = missing.iter().map(|tool| tool.name()).collect();
    let step = progress.step(format!("installing {}", names.join(", ")));
    step.detail("apt-get update");
    let mut update = Command::new("apt-get");
    update.arg("update").env("DEBIAN_FRONTEND", "noninteractive");
    process::run("apt-get update", update, log, INSTALL_DEADLINE).await?;
    // Only now does apt know which Java there is.
    let packages = debian_packages(missing);
    step.detail(format!("apt-get install {}", packages.join(" ")));
    let mut install = Command::new("apt-get");
    install
        .args(["install", "-y", "--no-install-recommends"])
        .args(&packages)
        .env("DEBIAN_FRONTEND", "noninteractive");
    process::run("apt-get install", install, log, INSTALL_DEADLINE).await?;
    step.done(&format!("installed {}", names.join(", ")));
    Ok(())
}

fn missing(tools: &[Tool]) -> Vec<Tool> {
    let findings = look(tools).into_iter();
    findings
        .filter(|finding| finding.found.is_none())
        .map(|finding| finding.tool)
        .collect()
}

fn debian_packages(missing: &[Tool]) -> Vec<String> {
    missing.iter().flat_map(|tool| tool.debian_packages()).collect()
}

/// Distributions carry one or two of these; a `default-jre` may be too old.
fn debian_java() -> String {
    let known = |package: &String| {
        Command::new("apt-cache")
            .args(["show", package])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    let package = |version: u32| format!("openjdk-{version}-jre-headless");
    let candidates = [21, 17, 25].map(package);
    candidates.into_iter().find(known).unwrap_or_else(|| package(OLDEST))
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

fn first_line(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().ok()?;
    if !output.status.success() {
        return None;
    }
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().next().map(|line| line.trim().to_owned())
}
