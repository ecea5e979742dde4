"""`make audit`: pip-audit over the lock files of what is deployed, which says plainly what it could not look up."""

import json
import subprocess
import sys

LOCKS = ("gateway", "tensorflow", "cuda")


def main() -> None:
    """Report known vulnerabilities; fail if there are any, but not because nobody could be asked."""
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    for lock in LOCKS:
        command += ["--requirement", f"requirements/{lock}.txt"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except ValueError:
        print(f"NOT AUDITED: pip-audit could not ask its service:\n{done.stderr[-600:]}")
        return
    packages = {(package["name"], package.get("version")): package for package in found}.values()
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    for package in packages:
        for flaw in package.get("vulns", []):
            print(f"{package['name']} {package['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions'])}")
    flawed = sum(bool(package.get("vulns")) for package in packages)
    print(f"{len(packages) - len(skipped)} of {len(packages)} packages audited, {flawed} with known vulnerabilities")
    if skipped:
        print(f"NOT AUDITED, as the service does not answer for them: {', '.join(skipped)}")
    sys.exit(1 if flawed else 0)


if __name__ == "__main__":
    main()
