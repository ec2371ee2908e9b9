use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::Context;
use devstack::{connect::ConnectPrograms, process, progress::Progress, servers::Servers};

use crate::{
    cli::Cli,
    docker::{self, Docker},
};

const DEADLINE: Duration = Duration::from_secs(20 * 60);
const DEBIAN: &str = "debian:bookworm-slim";
/// Its `promtool` tests the alert rules.
pub(crate) const PROMETHEUS: &str = "prom/prometheus:v3.5.0";

/// As the official image has it: apt keeps no packages and no index of them, which would double the layers.
const CLEAN: &str = "DPkg::Post-Invoke { \"rm -f /var/cache/apt/archives/*.deb\"; };\nDir::Cache::pkgcache \"\";\n\
                     Dir::Cache::srcpkgcache \"\";\n";

/// An image that docker-compose.yml or the Dockerfile names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Image {
    Debian,
    Rust,
    Postgres,
    Kafka,
    Debezium,
    Prometheus,
}

impl Image {
    fn name(self) -> &'static str {
        match self {
            Self::Debian => DEBIAN,
            Self::Rust => "rust:1.95-slim-bookworm",
            Self::Postgres => "postgres:18",
            Self::Kafka => "apache/kafka:4.1.0",
            Self::Debezium => "quay.io/debezium/connect:3.6.0.Final",
            Self::Prometheus => PROMETHEUS,
        }
    }

    /// Its folder below `compose/stand-ins`.
    fn folder(self) -> &'static str {
        match self {
            Self::Debian => "debian",
            Self::Rust => "rust",
            Self::Postgres => "postgres",
            Self::Kafka => "kafka",
            Self::Debezium => "debezium",
            Self::Prometheus => "prometheus",
        }
    }
}

/// Pulls what the check needs; of what cannot be pulled, makes a stand-in.
pub(crate) async fn ensure(
    docker: &Docker,
    root: &Path,
    contexts: &Path,
    log: &Path,
    cli: &Cli,
    progress: &Progress,
) -> anyhow::Result<()> {
    let mut wanted = vec![Image::Debian, Image::Postgres, Image::Kafka, Image::Prometheus];
    if !cli.prebuilt {
        wanted.push(Image::Rust);
    }
    if cli.debezium {
        wanted.push(Image::Debezium);
    }
    for image in wanted {
        if docker.has_or_pulls(image.name()).await? {
            continue;
        }
        // Stand-ins are built on the base, which a kept engine may have lost.
        let step = progress.step(format!("making a stand-in for {}", image.name()));
        let maker = Maker {
            docker,
            root,
            context: contexts.join(image.folder()),
            log,
            progress,
        };
        maker.make(image).await?;
        step.done(&format!("{} cannot be pulled: a stand-in", image.name()));
    }
    Ok(())
}

/// Of one image.
struct Maker<'a> {
    docker: &'a Docker,
    root: &'a Path,
    context: PathBuf,
    log: &'a Path,
    progress: &'a Progress,
}

impl Maker<'_> {
    async fn make(&self, image: Image) -> anyhow::Result<()> {
        if self.context.exists() {
            fs::remove_dir_all(&self.context).context("remove the remains of a build")?;
        }
        if image == Image::Debian {
            self.bootstrap().await?;
        } else {
            self.fill(image).await?;
            let dockerfile = self.context.join("Dockerfile");
            self.docker
                .build(image.name(), None, &dockerfile, &self.context, DEADLINE)
                .await?;
        }
        fs::remove_dir_all(&self.context).with_context(|| format!("remove {}", self.context.display()))
    }

    /// A minimal Debian as it comes from the mirror, with this machine's settings for fetching packages.
    async fn bootstrap(&self) -> anyhow::Result<()> {
        docker::install_missing("debootstrap", self.log, self.progress).await?;
        let tree = self.context.join("tree");
        fs::create_dir_all(&tree).with_context(|| format!("create {}", tree.display()))?;
        let mut debootstrap = Command::new("debootstrap");
        debootstrap
            .args(["--variant=minbase", "bookworm"])
            .arg(&tree)
            .args(mirror());
        self.run("debootstrap", debootstrap).await?;
        let settings = format!("{CLEAN}{}", fetching_packages().await?);
        fs::write(tree.join("etc/apt/apt.conf.d/99stand-in"), settings).context("write the settings of apt")?;
        let archive = self.context.join("debian.tar");
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(&tree).arg("-cf").arg(&archive);
        tar.args([
            "--exclude=./var/cache/apt/archives/*.deb",
            "--exclude=./var/lib/apt/lists/*",
            "--exclude=./usr/share/doc/*",
            "--exclude=./usr/share/man/*",
            "--exclude=./usr/share/locale/*",
            ".",
        ]);
        self.run("tar", tar).await?;
        let mut import = self.docker.command(&["import"]);
        import.arg(&archive).arg(DEBIAN);
        self.docker.run("docker import", import, DEADLINE).await?;
        self.docker.has_made(DEBIAN);
        Ok(())
    }

    /// The folder of the repository, and what it does not have.
    async fn fill(&self, image: Image) -> anyhow::Result<()> {
        let folder = self.root.join("compose/stand-ins").join(image.folder());
        fs::create_dir_all(self.context.parent().context("a context is in a folder")?)?;
        self.copy(&folder, &self.context).await?;
        match image {
            Image::Debian | Image::Prometheus => Ok(()),
            Image::Rust => {
                let sysroot = docker::output(command("rustc", &["--print", "sysroot"])).await?;
                let sysroot = docker::said("rustc --print sysroot", sysroot)?;
                // Without documentation and sources, which are the greater part.
                let toolchain = self.context.join("toolchain");
                fs::create_dir(&toolchain).with_context(|| format!("create {}", toolchain.display()))?;
                for part in ["bin", "lib"] {
                    self.copy(&Path::new(&sysroot).join(part), &toolchain).await?;
                }
                let mut vendor = command("cargo", &["vendor", "--locked", "--versioned-dirs", "--quiet"]);
                vendor.current_dir(self.root).arg(self.context.join("vendor"));
                self.run("cargo vendor", vendor).await
            }
            Image::Postgres => {
                let servers = Servers::ensure(self.log, self.progress).await?;
                let postgres = servers.dir().join("postgres");
                self.copy(&postgres, &self.context.join("postgres")).await
            }
            Image::Kafka => {
                let servers = Servers::ensure(self.log, self.progress).await?;
                self.copy(&servers.dir().join("kafka"), &self.context.join("kafka"))
                    .await?;
                let log4j = self.root.join("devstack/src/log4j2.properties");
                self.copy(&log4j, &self.context.join("log4j2.properties")).await
            }
            Image::Debezium => {
                let programs = ConnectPrograms::ensure(self.log, self.progress).await?;
                self.copy(&programs.dir().join("connect"), &self.context.join("connect"))
                    .await?;
                let log4j = self.root.join("devstack/debezium/log4j2.properties");
                self.copy(&log4j, &self.context.join("log4j2.properties")).await
            }
        }
    }

    async fn copy(&self, from: &Path, to: &Path) -> anyhow::Result<()> {
        let mut cp = Command::new("cp");
        cp.arg("-a").arg(from).arg(to);
        self.run("cp", cp).await
    }

    async fn run(&self, what: &str, command: Command) -> anyhow::Result<()> {
        process::run(what, command, self.log, DEADLINE).await
    }
}

fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

/// The one that this machine uses, if it is a Debian; any other system's packages would not do. Without one, debootstrap has its own.
fn mirror() -> Option<String> {
    let debian = fs::read_to_string("/etc/os-release").is_ok_and(|text| text.lines().any(|line| line == "ID=debian"));
    let sources = fs::read_to_string("/etc/apt/sources.list.d/debian.sources");
    let sources = sources.or_else(|_| fs::read_to_string("/etc/apt/sources.list"));
    sources.ok().filter(|_| debian).and_then(|text| {
        let urls = text.split_whitespace().filter(|word| word.starts_with("http"));
        urls.map(str::to_owned)
            .find(|url| !url.contains("snapshot") && !url.contains("security"))
    })
}

/// How this machine's apt gets its packages: proxies, and what it does not check. Empty where there is no apt.
async fn fetching_packages() -> anyhow::Result<String> {
    let Ok(dump) = docker::output(command("apt-config", &["dump", "Acquire"])).await else {
        return Ok(String::new());
    };
    let text = String::from_utf8_lossy(&dump.stdout).into_owned();
    let of_interest = ["::Proxy", "::Check-Valid-Until", "::Check-Date"];
    let lines = text
        .lines()
        .filter(|line| of_interest.iter().any(|name| line.contains(name)));
    Ok(lines.map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stand_ins_have_the_names_that_are_asked_for() {
        let asked = [
            include_str!("../../../../docker-compose.yml"),
            include_str!("../../../../Dockerfile"),
        ];
        for image in [
            Image::Debian,
            Image::Rust,
            Image::Postgres,
            Image::Kafka,
            Image::Debezium,
            Image::Prometheus,
        ] {
            let names = |line: &str| line.split_whitespace().any(|word| word == image.name());
            let found = asked.iter().flat_map(|text| text.lines()).any(names);
            assert!(found, "nobody asks for {}", image.name());
        }
    }
}
