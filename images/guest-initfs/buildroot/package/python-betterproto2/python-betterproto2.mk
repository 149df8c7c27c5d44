################################################################################
#
# python-betterproto2
#
################################################################################

# A pure wheel, pinned with its hash in requirements.lock and unpacked by images/guest-initfs/build.
PYTHON_BETTERPROTO2_SITE = $(TAPLOOM_WHEELS)/betterproto2
PYTHON_BETTERPROTO2_SITE_METHOD = local
PYTHON_BETTERPROTO2_LICENSE = MIT
PYTHON_BETTERPROTO2_DEPENDENCIES = python3

define PYTHON_BETTERPROTO2_INSTALL_TARGET_CMDS
	mkdir -p $(TARGET_DIR)/usr/lib/python$(PYTHON3_VERSION_MAJOR)/site-packages
	cp -r $(@D)/betterproto2 $(@D)/betterproto2-*.dist-info \
		$(TARGET_DIR)/usr/lib/python$(PYTHON3_VERSION_MAJOR)/site-packages/
endef

$(eval $(generic-package))
