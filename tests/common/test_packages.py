"""Laws of optional packages: the error names the missing ones and the command that installs them."""

from __future__ import annotations

import pytest

from coldstill.common.packages import PackagesMissing, require_packages


def test_installed_packages_pass_and_are_not_imported() -> None:
    require_packages("share")
    require_packages("share", "json", "numpy")


def test_each_missing_package_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(PackagesMissing) as caught:
        require_packages("capture,share", "numpy", "no_such_package_a", "no_such_package_b")
    assert "no_such_package_a, no_such_package_b" in str(caught.value)
    assert "numpy" not in str(caught.value)
    assert caught.value.fix == 'pip install "coldstill[capture,share]"'
